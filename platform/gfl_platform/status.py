"""Where a run stands: noted in its folder by the driver, read by `jobs.status`."""

import json
import time
from pathlib import Path
from typing import Any

from gfl_platform.delivery import RUN_FILE
from gfl_platform.events import Event
from gfl_platform.spool import backlog
from gfl_platform.storage import read_json, write_atomically

STATUS_FILE = "status.json"

SILENCE = 300.0
"""Seconds without a word from a running driver, after which it is asked for."""


class StatusFile:
    """Notes where a run stands, at most every second; a context that notes its end."""

    def __init__(self, folder: Path, workers: int, nodes: int) -> None:
        """Begin, or go on with the counts of the driver before.

        Args:
            folder: The run's.
            workers: Training processes.
            nodes: Of the cluster.
        """
        self._path = folder / STATUS_FILE
        before = read_json(self._path)
        self._facts: dict[str, Any] = {
            "restarts": before["restarts"] + 1 if before else 0,
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

    def handle(self, event: Event) -> None:
        """Note what `event` tells."""
        facts = self._facts
        match event["kind"]:
            case "steps":
                if self._lost_at is not None:  # it steps again
                    facts["lost_seconds"] += time.time() - self._lost_at
                    self._lost_at = None
                facts |= {key: event[key] for key in ("epoch", "step", "total_steps")}
                facts |= {"state": "training", "seconds_left": event["seconds_left"]}
                facts["images_per_second"] = event["metrics"]["images_per_second"]
            case "workers":
                facts |= {"workers": event["count"], "nodes": event["nodes"]}
            case "checkpoint":
                facts["ap"] = event["metrics"]["AP"]
                facts["best_ap"] = max(facts["best_ap"] or -1.0, facts["ap"])
            case "failure":
                facts["restarts"] += 1
                facts["state"] = f"restarting after worker {event['rank']}: {event['reason']}"
                self._lost_at = time.time()
            case _:
                return
        if event["kind"] != "steps" or time.time() - self._written >= 1:
            self._write()

    def _write(self) -> None:
        self._written = self._facts["time"] = time.time()
        write_atomically(self._path, json.dumps(self._facts) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """Return where the run in `folder` stands, as `jobs.status` shows it."""
    facts = read_json(folder / STATUS_FILE)
    rows: dict[str, Any] = {"state": facts.get("state", "not started")}
    age = time.time() - facts.get("time", time.time())
    if rows["state"] not in ("finished", "stopped", "failed") and age > SILENCE:
        rows["state"] += f"; no word for {age / 60:.0f} min: if its driver is gone, use --resume"
    if "step" in facts:
        left = facts["seconds_left"] if rows["state"] == "training" else 0
        rows["epoch"] = f"{facts['epoch']:.2f} (step {facts['step']} of {facts['total_steps']})"
        rows["left"] = f"{left / 60:.0f} min, evaluations not counted" if left else "-"
        rows["images/s"] = f"{facts['images_per_second']:.1f}"
    if "ap" in facts:
        rows["AP"] = f"{facts['ap']:.4f}, best {facts['best_ap']:.4f}"
    rows["workers"] = f"{facts.get('workers', '-')} (nodes of the cluster: {facts.get('nodes')})"
    lost = facts.get("lost_seconds", 0.0)
    rows["restarts"] = f"{facts.get('restarts', 0)}, {lost / 60:.1f} min lost"
    rows["last word"] = f"{age:.0f} s ago"
    rows["MLflow run"] = read_json(folder / RUN_FILE).get("run_id", "none yet")
    rows["waits for MLflow"] = f"{backlog(folder)} events"
    return rows
