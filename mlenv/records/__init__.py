"""What is kept of a training: runs in MLflow, and what they read."""
