"""Sweeps over the configuration: search, trials, their records."""
