"""The configuration: its schema, and the loader of YAML files."""
