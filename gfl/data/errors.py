"""What reading data raises."""


class DataError(ValueError):
    """A dataset that cannot be used; the message names the file, what is wrong and what to do."""
