"""Errors that the users of a training catch; importing them loads nothing else."""


class DataError(ValueError):
    """An unusable dataset; the message has the file, the problem and what to do."""


class PreemptedError(RuntimeError):
    """Training was preempted and stopped with a checkpoint, from which it can be continued."""


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity; the message names the first such tensor and the images."""
