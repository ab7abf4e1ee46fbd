"""The catalogue of features, read from the runs that MLflow keeps."""
