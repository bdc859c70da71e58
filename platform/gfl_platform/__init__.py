"""Where and how detectors are trained: Ray, MLflow, storage. Import its modules."""
