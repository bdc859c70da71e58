"""Convolutions that are faster than torch's own."""
