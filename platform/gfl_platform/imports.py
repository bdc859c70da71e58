"""Imports that take seconds, made while a job waits for others."""

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def imported_meanwhile(*modules: str) -> Iterator[None]:
    """Import modules in a thread while other processes are waited for."""

    def load() -> None:
        for module in modules:
            with suppress(Exception):  # whoever needs it is told
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
