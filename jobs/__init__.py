"""Entry points of `python -m jobs.NAME`, on a laptop or through `ray job submit`."""
