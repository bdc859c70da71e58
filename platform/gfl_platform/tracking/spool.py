"""The spool: a file in a run's folder, in which events wait until they are logged to MLflow.

A driver that dies or a store that does not answer loses no event. Events that the store refuses for
good are kept in a table of their own.
"""

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from gfl_platform.cluster.events import Event, Unknown, from_json, name_of, to_json
from gfl_platform.redaction import redact

logger = logging.getLogger(__name__)

SPOOL_FILE = "spool.db"
"""SQLite file in a run's folder that holds the spool."""

LIMIT_BYTES = 64_000_000
"""Size of the waiting events at which the oldest reports of steps are dropped."""

LOCK_SECONDS = 60.0
"""Seconds to wait for the file's lock, which another process holds while it counts the events."""

TABLES = """
    CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, event TEXT);
    CREATE TABLE IF NOT EXISTS refused (id INTEGER PRIMARY KEY, kind TEXT, event TEXT, reason TEXT);
    CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value INT);
    CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT);
"""
"""The waiting events, the events that the store refused, counters, and notes."""


class Spool:
    """A queue of events, counters and notes in a file, used by one process.

    Its threads take turns. A damaged file is put aside with a warning, and a new one takes its
    place.
    """

    def __init__(self, path: Path, limit: int = LIMIT_BYTES) -> None:
        """Open or create the spool at `path`; `limit` is its largest size in bytes."""
        self.path, self._limit = path, limit
        self._lock = threading.RLock()
        self._db = self._open()

    def __len__(self) -> int:
        with self._turn() as db:
            (count,) = db.execute("SELECT count(*) FROM events").fetchone()
        return int(count)

    @property
    def is_new(self) -> bool:
        """Whether the spool has never held an event or a counter."""
        with self._turn() as db:
            (count,) = db.execute("SELECT count(*) FROM numbers").fetchone()
        return not count and not len(self)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes of the context together, or none of them if it raises an exception."""
        with self._turn() as db, db:
            db.execute("BEGIN IMMEDIATE")
            yield

    def add(self, event: Event) -> None:
        """Append an event without the secrets in it."""
        row = (name_of(event), redact(json.dumps(to_json(event))))
        with self._turn() as db:
            if self._size() >= self._limit:
                self._thin_out()
            db.execute("INSERT INTO events (kind, event) VALUES (?, ?)", row)

    def first(self, count: int) -> dict[int, Event]:
        """Return the oldest `count` events, by their numbers in the queue."""
        with self._turn() as db:
            rows = db.execute("SELECT id, event FROM events ORDER BY id LIMIT ?", (count,))
            return {number: _parse(event) for number, event in rows}

    def remove(self, last: int) -> None:
        """Remove the events up to the one with the number `last`."""
        with self._turn() as db:
            db.execute("DELETE FROM events WHERE id <= ?", (last,))

    def refuse(self, number: int, reason: str) -> None:
        """Move an event to those that the store refused, for `reason`."""
        columns, which = "SELECT id, kind, event, ? FROM events WHERE id = ?", (reason, number)
        with self.transaction():
            self._db.execute(f"REPLACE INTO refused {columns}", which)
            self._db.execute("DELETE FROM events WHERE id = ?", (number,))

    def recall_refused(self) -> None:
        """Let the events that the store refused wait again, in their order, before the others."""
        with self.transaction():
            self._db.execute("REPLACE INTO events SELECT id, kind, event FROM refused")
            self._db.execute("DELETE FROM refused")

    def raise_to(self, name: str, value: int) -> bool:
        """Raise a counter to `value`, and return whether it was lower; a new counter is 0."""
        with self._turn() as db:
            (before,) = db.execute(
                "SELECT coalesce(max(value), 0) FROM numbers WHERE name = ?", (name,)
            ).fetchone()
            if value > before:
                db.execute("REPLACE INTO numbers VALUES (?, ?)", (name, value))
        return bool(value > before)

    def count(self, name: str) -> int:
        """Increase a counter by one, and return it."""
        with self._turn() as db:
            row = db.execute(
                "INSERT INTO numbers VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET "
                "value = value + 1 RETURNING value",
                (name,),
            ).fetchone()
        return int(row[0])

    def note(self, notes: Mapping[str, str]) -> None:
        """Keep texts by their names."""
        with self._turn() as db:
            db.executemany("REPLACE INTO notes VALUES (?, ?)", notes.items())

    def notes(self) -> dict[str, str]:
        """Return the texts that were kept, by their names."""
        with self._turn() as db:
            return dict(db.execute("SELECT name, value FROM notes"))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def replace_if_damaged(self, error: Exception) -> bool:
        """Put the file aside and begin a new one, if `error` says that it is damaged."""
        if not is_damage(error):
            return False
        with self._lock:
            self._db.close()
            self._db = self._open()
        return True

    @contextmanager
    def _turn(self) -> Iterator[sqlite3.Connection]:
        """Give the database to one thread at a time."""
        with self._lock:
            yield self._db

    def _open(self) -> sqlite3.Connection:
        """Open the file; put it aside first if it is damaged, and keep its counters and notes."""
        try:
            return _connect(self.path)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            reason = str(error)
        aside = self.path.with_name(f"{SPOOL_FILE}.damaged-{time.time_ns() // 1_000_000}")
        logger.warning(
            "warning: %s is damaged (%s); it is kept as %s, and what waited in it for MLflow is "
            "not logged",
            self.path,
            reason,
            aside.name,
        )
        for suffix in ("", "-journal"):  # The journal of one file would spoil the next one.
            if (left := self.path.with_name(SPOOL_FILE + suffix)).exists():
                left.rename(f"{aside}{suffix}")
        db = _connect(self.path)
        with suppress(sqlite3.Error), closing(sqlite3.connect(aside)) as damaged:
            for table in ("notes", "numbers"):
                rows = damaged.execute(f"SELECT name, value FROM {table}").fetchall()
                db.executemany(f"REPLACE INTO {table} VALUES (?, ?)", rows)
        return db

    def _size(self) -> int:
        """Return the size of the file in bytes, without its free pages."""
        size, pages, free = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        return int(size * (pages - free))

    def _thin_out(self) -> None:
        """Drop the oldest tenth of the reports of steps."""
        dropped = self._db.execute(
            "DELETE FROM events WHERE id IN "
            "(SELECT id FROM events WHERE kind = 'steps' ORDER BY id LIMIT "
            "(SELECT count(*) / 10 + 1 FROM events WHERE kind = 'steps'))"
        ).rowcount
        if dropped:
            logger.warning(
                "tracking: %s is full; %d reports of steps were dropped", self.path, dropped
            )


def _parse(text: str) -> Event:
    try:
        return from_json(json.loads(text))
    except (ValueError, TypeError, KeyError):
        return Unknown("unreadable")


def is_damage(error: Exception) -> bool:
    """Return whether an error says that a file is damaged or no database."""
    code = error.sqlite_errorcode & 0xFF if isinstance(error, sqlite3.DatabaseError) else None
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _connect(path: Path) -> sqlite3.Connection:
    """Open or create a spool.

    Raises:
        sqlite3.DatabaseError: the file cannot be opened; `is_damage` if it is damaged.
    """
    is_empty = path.exists() and not path.stat().st_size
    # Outside `transaction` every statement commits by itself.
    db = sqlite3.connect(path, LOCK_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.text_factory = lambda text: text.decode(errors="replace")
        db.execute("PRAGMA synchronous = NORMAL")
        (state,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if is_empty or state != "ok":
            error = sqlite3.DatabaseError("it is empty" if is_empty else " ".join(state.split()))
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        db.executescript(TABLES)
    except sqlite3.Error:
        db.close()
        raise
    return db


def backlog(folder: Path) -> int:
    """Return the number of events of a run that wait for MLflow; its driver may be running."""
    return sum(count for (count,) in _rows(folder, "SELECT count(*) FROM events"))


def refusals(folder: Path) -> list[str]:
    """Return the reasons for which the store refused events of a run, one for each event."""
    return [reason for (reason,) in _rows(folder, "SELECT reason FROM refused ORDER BY id")]


def is_settled(folder: Path) -> bool:
    """Return whether MLflow has all events of a run; false if its spool cannot be read."""
    try:
        return not backlog(folder) and not refusals(folder)
    except sqlite3.Error:
        return False


def _rows(folder: Path, query: str) -> list[tuple[Any]]:
    """Return the rows of a query to the spool of a run, which another process may be writing.

    Raises:
        sqlite3.Error: the file is locked or damaged.
    """
    path = folder / SPOOL_FILE
    if not path.exists() or not path.stat().st_size:
        return []
    # Opened for writing, because SQLite has to roll back what a killed driver left half-written.
    uri = f"{path.resolve().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, 10, uri=True)) as db:
        return db.execute(query).fetchall()
