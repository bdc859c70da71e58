"""Errors that whoever drives a training has to know, without all that a training needs."""


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity; the message names the first tensor and the images."""
