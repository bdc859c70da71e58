"""MLflow's model registry: lookup, registration, the gate before `champion`, model cards."""

from gfl_platform.registry.models import load

__all__ = ["load"]
