"""What a model does with other values: replay, simulation, skew."""
