"""Where rows come from: Parquet, simulated logs, converters of public sets; and how rows become batches."""
