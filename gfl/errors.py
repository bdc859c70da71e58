"""Errors that whoever drives a training has to know, without all that a training needs."""


class DataError(ValueError):
    """A dataset that cannot be used; the message names the file, what is wrong and what to do."""


class LeaveError(RuntimeError):
    """Training stopped with a checkpoint because it was asked to; it can go on elsewhere."""


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity; the message names the first tensor and the images."""
