"""The training job: driver, Ray fit and worker."""
