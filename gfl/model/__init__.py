"""The detector: backbone, head, assigner, losses, criterion and post-processing."""
