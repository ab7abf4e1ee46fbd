"""Trainings in several processes, on clusters and by schedulers."""
