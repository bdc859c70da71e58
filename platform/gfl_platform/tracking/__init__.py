"""MLflow runs: client, spool, run metadata, status."""
