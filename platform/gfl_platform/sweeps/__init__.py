"""Sweeps: a search over keys of the configuration, and the report that answers what it asked."""
