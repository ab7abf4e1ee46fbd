"""What a model looks at, and what is in its tables."""
