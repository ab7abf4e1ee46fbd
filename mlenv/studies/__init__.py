"""Many trainings: searches over keys, comparisons over seeds."""
