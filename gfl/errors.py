"""Errors that whoever drives a training has to know, without all that a training needs."""


class DataError(ValueError):
    """A dataset that cannot be used; the message names the file, what is wrong and what to do."""


class PreemptedError(RuntimeError):
    """Training was preempted and stopped with a checkpoint, from which it can be continued."""


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity; the message names the first tensor and the images."""
