"""Whether a model in use is still what it was: its scores, its features, its data, its age."""
