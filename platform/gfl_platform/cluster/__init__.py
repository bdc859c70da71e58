"""Ray: resources, launch of workers, pre-flight checks, events, job submission."""
