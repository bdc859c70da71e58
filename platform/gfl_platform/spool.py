"""Events on their way to MLflow: a SQLite file beside the run, so that a dead server loses none."""

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gfl_platform.cluster.events import Event

logger = logging.getLogger(__name__)

SPOOL_FILE = "spool.db"
"""In a run's folder."""

LIMIT = 100_000
"""Events; beyond, a tenth of the oldest training steps gives way. About 40 MB."""

PATIENCE = 60.0
"""Seconds to wait for another thread or process, whose disk may be slow."""


class Spool:
    """A queue of events in a file, and numbers that outlive the process; of one process only.

    The threads that add and remove have one each.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        """Open the spool at `path`, or make one."""
        self.path, self._limit = path, limit
        # Outside `transaction` every statement is one of its own; a job's threads take turns.
        self._db = sqlite3.connect(path, PATIENCE, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS events "
            "(id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, event TEXT)"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value INT)")

    def __len__(self) -> int:
        (count,) = self._db.execute("SELECT count(*) FROM events").fetchone()
        return int(count)

    @property
    def is_new(self) -> bool:
        """Whether nothing was ever noted."""
        (count,) = self._db.execute("SELECT count(*) FROM numbers").fetchone()
        return not count and not len(self)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Let all that is done within outlive the process, or nothing of it."""
        with self._db:  # which commits, or takes back
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def add(self, event: Event) -> None:
        """Append an event."""
        if len(self) >= self._limit:
            self._thin_out()
        row = (event["kind"], json.dumps(event, default=str))
        self._db.execute("INSERT INTO events (kind, event) VALUES (?, ?)", row)

    def first(self, count: int) -> dict[int, Event]:
        """Return the oldest events by their numbers, in order."""
        rows = self._db.execute("SELECT id, event FROM events ORDER BY id LIMIT ?", (count,))
        return {number: json.loads(event) for number, event in rows}

    def remove(self, last: int) -> None:
        """Forget the events up to the one numbered `last`."""
        self._db.execute("DELETE FROM events WHERE id <= ?", (last,))

    def raise_to(self, name: str, value: int) -> bool:
        """Raise a number to `value`; return whether it was lower (0 at first)."""
        (before,) = self._db.execute(
            "SELECT coalesce(max(value), 0) FROM numbers WHERE name = ?", (name,)
        ).fetchone()
        if value > before:
            self._db.execute("REPLACE INTO numbers VALUES (?, ?)", (name, value))
        return bool(value > before)

    def count(self, name: str) -> int:
        """Return how often this was asked, this time included."""
        row = self._db.execute(
            "INSERT INTO numbers VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1 "
            "RETURNING value",
            (name,),
        ).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _thin_out(self) -> None:
        dropped = self._db.execute(
            "DELETE FROM events WHERE id IN "
            "(SELECT id FROM events WHERE kind = 'steps' ORDER BY id LIMIT ?)",
            (max(self._limit // 10, 1),),
        ).rowcount
        logger.warning("tracking: %s is full; %d reports of steps were dropped", self.path, dropped)


def backlog(folder: Path) -> int:
    """Return how many events of the run in `folder` wait for MLflow; its driver may be running."""
    path = folder / SPOOL_FILE
    if not path.exists():
        return 0
    # Not only to read: what a killed driver left half-written has to be rolled back.
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True) as db:
        (count,) = db.execute("SELECT count(*) FROM events").fetchone()
    return int(count)
