"""Convolutions and memory settings that are faster than the stock ones."""
