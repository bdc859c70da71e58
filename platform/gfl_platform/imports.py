"""Imports that take seconds, made while a job waits for others."""

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imported_meanwhile(*modules: str) -> Iterator[None]:
    """Import modules in a thread while other processes are waited for."""

    def load() -> None:
        for module in modules:
            importlib.import_module(module)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
