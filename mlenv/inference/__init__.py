"""Stored models, opened and asked about rows."""
