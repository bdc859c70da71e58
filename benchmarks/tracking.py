"""What tracking and checkpoints add to a fit: `python -m benchmarks.tracking`, ten minutes.

One fit, whose driver changes its ways every few seconds: it tells an MLflow server of a step and of
a checkpoint, drops what it hears, tells a server, tells a server that is down. So a machine that
grows slower does so in all ways. The time is the worker's, of its reports of steps. There is one
worker: the driver has a core of its own, as the head of a cluster has.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gfl_platform.cluster.events import Event, StepsDone

CONFIG = "configs/sweeps/demo_trial.yaml"
WAYS = ("checkpoint", "off", "on", "down")
"""Of the driver, each for a block of steps; the checkpoint falls into the middle of its block."""
BLOCK, EVERY = 16, 2
"""Steps of a block; steps between reports."""
EPOCH_SECONDS = 60


class Server:
    """An MLflow server that can be killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return when it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--port", str(self._port), "--artifacts-destination", f"{self._folder}/artifacts"),
            *("--backend-store-uri", f"sqlite:///{self._folder}/server.db"),
        ]
        # Else eight more processes start while the worker trains, for jobs that nobody submits.
        alone = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=alone
            )
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)

    def kill(self) -> None:
        """End it and its worker."""
        os.killpg(self._process.pid, 9)
        self._process.wait()


class Turns:
    """Hands events to the tracker of the way whose turn it is, and notes when steps were done."""

    def __init__(self, trackers: dict[str, Any]) -> None:
        self._trackers, self._block = trackers, 0
        self.times: dict[int, list[float]] = defaultdict(list)
        """Of every block, in seconds."""

    def handle(self, event: Event) -> None:
        """Note the time of `event`; let the tracker log it."""
        if isinstance(event, StepsDone):
            block = (event.step + BLOCK // 2) // BLOCK
            if block != self._block:
                if before := self._tracker:
                    before.flush()
                self._block = block
            self.times[block].append(event.time_ms / 1000)
        if tracker := self._tracker:
            tracker.handle(event)

    @property
    def _tracker(self) -> Any:
        return self._trackers[WAYS[self._block % len(WAYS)]]

    def seconds(self) -> dict[str, list[float]]:
        """Return what the blocks of every way took, of whole turns after the first.

        From the second report on: before it the block before may be logged.
        """
        whole = BLOCK // EVERY
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        blocks = [self.times[block] for block in range(max(self.times) + 1)]
        for start in range(len(WAYS), len(blocks), len(WAYS)):
            turn = blocks[start : start + len(WAYS)]
            if [len(times) for times in turn] == [whole] * len(WAYS):
                for way, times in zip(WAYS, turn, strict=True):
                    found[way].append(times[-1] - times[1])
        return found


def fit(overrides: list[str], root: Path) -> dict[str, list[float]]:
    """Return the seconds of the blocks of every way."""
    from gfl_platform.cluster import resources
    from gfl_platform.cluster.event_queue import pumped
    from gfl_platform.config import load_job
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store
    from gfl_platform.tracking.metadata import describe
    from gfl_platform.tracking.run import RunTracker
    from gfl_platform.training.fit import run
    from gfl_platform.training.sources import fetch_sources

    server, nobody = Server(root), Server(root)
    server.start()
    where = [f"storage.root={root}", "tracking.unreachable=spool", *overrides]
    resources.connect()
    job, job_down = (
        load_job(CONFIG, [f"tracking.uri={each.uri}", *where]) for each in (server, nobody)
    )
    storage = Storage(job.storage)
    folder, folder_down = (
        storage.open_run_folder(name, resume=False) for name in ("reached", "unreached")
    )
    store, store_down = Store(job.tracking, storage), Store(job_down.tracking, storage)
    try:
        with (
            RunTracker(store, folder, describe(job, "on")) as on,
            RunTracker(store_down, folder_down, describe(job_down, "down")) as down,
        ):
            turns = Turns({"checkpoint": on, "off": None, "on": on, "down": down})
            with pumped(turns.handle) as events:
                run(job, fetch_sources(job, store), resources.allot(job), folder, events)
    finally:
        server.kill()
    return turns.seconds()


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Return the median and the quartiles beside it."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median": median, "lower": lower, "upper": upper}


def main() -> None:
    """Print the seconds of each way, and what tracking and a checkpoint cost."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("overrides", nargs="*", help="key=value, such as data.batch=8")
    made.add_argument("--turns", type=int, default=24, help="of the four ways")
    made.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = made.parse_args()
    from gfl.config.loader import load_config
    from gfl.data.samplers import TrainBatches
    from gfl.data.split import load_splits

    config = load_config(CONFIG, ["schedule.epochs=1", *arguments.overrides])
    train, _ = load_splits(config)  # renders the shapes before any clock
    pass_steps = TrainBatches(train.records, config, 0, 1, 0).total_steps
    turn = BLOCK * len(WAYS)
    overrides = [
        "schedule.epochs=1",
        f"data.repeat={math.ceil((arguments.turns + 2) * turn / pass_steps)}",
        f"tracking.every_steps={EVERY}",
        f"storage.checkpoint_steps={turn}",
        *arguments.overrides,
    ]
    with tempfile.TemporaryDirectory() as folder:
        seconds = fit(overrides, Path(folder))
    turns = list(zip(*(seconds[way] for way in WAYS), strict=True))
    checkpoint = quartiles(kept - on for kept, _, on, _ in turns)
    figures = {
        "turns": len(turns),
        "seconds": {way: quartiles(seconds[way]) for way in WAYS},
        "on_ratio": quartiles(on / off for _, off, on, _ in turns),
        "down_ratio": quartiles(down / off for _, off, _, down in turns),
        "checkpoint_s": checkpoint,
        "share_of_epoch": checkpoint["median"] / EPOCH_SECONDS,
    }
    print(json.dumps(figures, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures | {"blocks": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
