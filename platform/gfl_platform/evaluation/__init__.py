"""Evaluation and benchmark jobs: driver and worker of each in one file."""
