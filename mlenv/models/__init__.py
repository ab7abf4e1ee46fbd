"""Registered models: versions, gates, promotion, rollback."""
