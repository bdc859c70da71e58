"""MLflow's model registry: lookup, registration, the gate before `champion`, model cards."""
