"""Checkpoint files, state dicts, pretrained weights and other projects' parameter names."""
