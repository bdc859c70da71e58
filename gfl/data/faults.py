"""Faults of annotation files, collected so that one message names them all."""

from collections.abc import Iterator
from contextlib import contextmanager

from gfl.errors import DataError

SHOWN_FAULTS = 10
"""Number of faults that one message names."""


class Faults:
    """The faults of one set of annotations, which one message reports together."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the message of a `DataError` in the context, and go on behind it."""
        try:
            yield
        except DataError as error:
            self.add(str(error))

    def add(self, message: str) -> None:
        """Keep the message of a fault."""
        self._messages.append(message)

    def report(self) -> None:
        """Raise the collected faults.

        Raises:
            DataError: There is a fault.
        """
        if self._messages:
            more = len(self._messages) - SHOWN_FAULTS
            counted = [f"and {more} more"] if more > 0 else []
            raise DataError("; ".join(self._messages[:SHOWN_FAULTS] + counted))
