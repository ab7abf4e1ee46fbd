"""What ``data.transforms`` can do to rows between Parquet and the schema; the contract is ``mlenv.config.TransformConfig``."""
