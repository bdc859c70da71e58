"""What a model does on a set of images: errors, working thresholds, uncertainty of its edges."""
