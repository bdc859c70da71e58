"""The status of a run, which its driver writes to a file and `jobs.status` shows."""

import json
import logging
import sqlite3
import time
from itertools import count
from pathlib import Path
from typing import Any

from gfl.files import write_atomically
from gfl_platform.cluster.events import (
    CheckpointStored,
    EpochEvaluated,
    Event,
    StepsDone,
    WorkerFailed,
    WorkersStarted,
)
from gfl_platform.redaction import redact
from gfl_platform.storage.files import read_rebuildable
from gfl_platform.tracking.client import TrackingError
from gfl_platform.tracking.metadata import read_run_file
from gfl_platform.tracking.spool import SPOOL_FILE, backlog, refusals

logger = logging.getLogger(__name__)

STATUS_FILE = "status.json"
"""File in a run's folder that holds its status."""

ENDED = ("finished", "stopped", "failed")
"""States of a run that has ended."""

SILENCE = 300.0
"""Seconds without a report after which the driver of a run may be dead."""


class StatusFile:
    """Writes the status of a run, steps at most once a second; its context writes the end."""

    def __init__(self, folder: Path, workers: int, nodes: int) -> None:
        """Write the first status; restarts and lost time of earlier drivers are kept.

        Args:
            folder: The run's folder.
            workers: Number of training processes.
            nodes: Number of nodes of the cluster.
        """
        self._path = folder / STATUS_FILE
        before = read_rebuildable(self._path)
        self._facts: dict[str, Any] = {
            "restarts": before.get("restarts", -1) + 1,
            "lost_seconds": before.get("lost_seconds", 0.0),
            "best_ap": before.get("best_ap"),
        }
        self._facts |= {"state": "starting", "workers": workers, "nodes": nodes}
        self._lost_at: float | None = before.get("time")
        self._written = 0.0
        self._write()

    def __enter__(self) -> "StatusFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self._facts["state"] = "finished" if kind is None else "stopped" if stopped else "failed"
        self._write()

    @property
    def outages(self) -> dict[str, float]:
        """Number of restarts after a loss, and minutes without a step."""
        facts = self._facts
        return {"restarts": facts["restarts"], "lost_minutes": facts["lost_seconds"] / 60}

    def handle(self, event: Event) -> None:
        """Add an event to the status."""
        facts = self._facts
        match event:
            case StepsDone(repeated=False):
                if self._lost_at is not None:  # Training continues after a loss.
                    facts["lost_seconds"] += time.time() - self._lost_at
                    self._lost_at = None
                facts |= {key: getattr(event, key) for key in ("epoch", "step", "total_steps")}
                facts |= {"state": "training", "seconds_left": event.seconds_left}
                facts["metrics"] = event.metrics
            case WorkersStarted(count=count, nodes=nodes):
                facts |= {"workers": count, "nodes": nodes, "state": "starting"}
            case EpochEvaluated(metrics=metrics):
                facts["ap"] = metrics["AP"]
                facts["best_ap"] = max(facts["best_ap"] or -1.0, facts["ap"])
            case CheckpointStored(metrics=metrics):
                facts["checkpoint_seconds"] = metrics["checkpoint_seconds"]
            case WorkerFailed(rank=rank, reason=reason, final=False):
                facts["restarts"] += 1
                facts["state"] = f"restarting after worker {rank}: {reason}"
                self._lost_at = time.time()
            case _:
                return
        if not isinstance(event, StepsDone) or time.time() - self._written >= 1:
            self._write()

    def _write(self) -> None:
        self._written = self._facts["time"] = time.time()
        try:
            write_atomically(self._path, redact(json.dumps(self._facts)) + "\n")
        except OSError as error:  # A full device must not hide the reason why a training ends.
            logger.warning("%s: %s", self._path, error.strerror)


def note_killed(folder: Path) -> bool:
    """Write the state `stopped` if the driver was killed; return whether it was.

    Args:
        folder: The run's folder, which the caller has locked, so that the driver is gone.
    """
    facts = read_rebuildable(folder / STATUS_FILE)
    if not facts or facts.get("state") in ENDED:
        return False
    write_atomically(folder / STATUS_FILE, json.dumps(facts | {"state": "stopped"}) + "\n")
    return True


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status of the run in `folder` as rows of a table."""
    facts = read_rebuildable(folder / STATUS_FILE)
    try:
        run_id = read_run_file(folder).get("run_id")
    except TrackingError as error:
        logger.warning("warning: %s", error)
        run_id = None
    elsewhere = "unknown here; ask on its driver's machine" if run_id else "not started"
    rows: dict[str, Any] = {"state": facts.get("state", elsewhere)}
    age = time.time() - facts.get("time", time.time())
    if facts and rows["state"] not in ENDED and age > SILENCE:
        rows["state"] += f"; no word for {age / 60:.0f} min: if its driver is gone, use --resume"
    if "step" in facts:
        left = facts["seconds_left"] if rows["state"] == "training" else 0
        rows["epoch"] = f"{facts['epoch']:.2f} (step {facts['step']} of {facts['total_steps']})"
        rows["left"] = f"{left / 60:.0f} min, evaluations not counted" if left else "-"
        rows |= _rates(facts["metrics"])
    if "ap" in facts:
        rows["AP"] = f"{facts['ap']:.4f}, best {facts['best_ap']:.4f}"
    rows["workers"] = f"{facts.get('workers', '-')} (nodes of the cluster: {facts.get('nodes')})"
    if "checkpoint_seconds" in facts:
        rows["checkpoint"] = f"written in {facts['checkpoint_seconds']:.1f} s, beside training"
    lost = facts.get("lost_seconds", 0.0)
    rows["restarts"] = f"{facts.get('restarts', 0)}, {lost / 60:.1f} min lost"
    rows["last word"] = f"{age:.0f} s ago"
    rows["MLflow run"] = run_id or "none yet"
    return rows | _spooled(folder)


def _spooled(folder: Path) -> dict[str, str]:
    """Return rows on the events that MLflow does not have."""
    try:
        rows = {"waits for MLflow": f"{backlog(folder)} events"}
        refused = refusals(folder)
    except sqlite3.Error as error:
        return {"waits for MLflow": f"unknown: {folder / SPOOL_FILE}: {error}"}
    if refused:
        rows["refused by MLflow"] = (
            f"{len(refused)} events, the last one {refused[-1]}; --deliver tries them again"
        )
    return rows


def _rates(metrics: dict[str, float]) -> dict[str, str]:
    """Return rows on the speed of the training and on the resources of its workers."""
    p50, p90, p99 = (metrics[f"step_ms_p{percent}"] for percent in (50, 90, 99))
    rows = {
        "images/s": f"{metrics['images_per_second']:.1f}",
        "a step": f"{p50:.0f} ms; one in ten {p90:.0f} ms or more, one in a hundred {p99:.0f} ms",
        "waits for images": f"{metrics['data_wait_share']:.0%} of the time",
    }
    for rank in count():
        names = ("data_wait_share", "memory_gib", "gpu", "gpu_memory_gib")
        usage = {name: metrics.get(f"worker{rank}.{name}") for name in names}
        if usage["memory_gib"] is None:
            return rows
        waiting = f"waits for images {usage['data_wait_share']:.0%} of the time"
        texts = [waiting, f"{usage['memory_gib']:.1f} GiB"]
        if usage["gpu"] is not None:
            texts.append(f"GPU busy {usage['gpu']:.0%}")
        if usage["gpu_memory_gib"] is not None:
            texts.append(f"{usage['gpu_memory_gib']:.1f} GiB on the GPU")
        rows[f"worker {rank}"] = ", ".join(texts)
    return rows
