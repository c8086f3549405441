"""Raw rows to encoded Parquet (`prepare`, `flights`), and encoded Parquet to batches (`loader`)."""
