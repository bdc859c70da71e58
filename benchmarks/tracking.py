"""What tracking and checkpoints add to a fit: `python -m benchmarks.tracking`, ten minutes.

One fit in four ways, in turn: with a driver that drops what it is told, with an MLflow server, with
that server dead, and with tracking and checkpoints within the epoch. The time is the worker's, from
its first report of steps to its last. There is one worker: the driver has a core of its own, as the
head of a cluster has.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

CONFIG = "configs/sweeps/demo_trial.yaml"
WAYS = ("off", "on", "down", "checkpoints")
CHECKPOINTS = 4
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


def fit(overrides: Sequence[str], root: Path, name: str, server: Server, way: str) -> float:
    """Return the seconds of a fit."""
    from gfl_platform import cluster
    from gfl_platform.config import load_job
    from gfl_platform.events import Event, pumped
    from gfl_platform.fitting import fetch_sources, run
    from gfl_platform.storage import open_run_folder
    from gfl_platform.tracking import RunTracker

    where = [f"storage.root={root}", f"tracking.uri={server.uri}", "tracking.unreachable=spool"]
    job = load_job(CONFIG, [*where, *overrides])
    cluster.connect()
    folder = open_run_folder(job, name, resume=False)
    times = []
    with ExitStack() as stack:
        tracker = None if way == "off" else stack.enter_context(RunTracker(job, name, folder))

        def handle(event: Event) -> None:
            if event["kind"] == "steps":
                times.append(event["time_ms"] / 1000)
            if tracker:
                tracker.handle(event)

        events = stack.enter_context(pumped(handle))
        run(job, fetch_sources(job), cluster.allot(job), folder, events)
    return times[-1] - times[0]


def main() -> None:
    """Print the seconds of each way, and what tracking and a checkpoint cost."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("overrides", nargs="*", help="key=value, such as data.repeat=2")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = made.parse_args()
    from gfl.configfile import load_config
    from gfl.data import load_splits
    from gfl.data.loading import TrainBatches

    overrides = ["data.repeat=3", "schedule.epochs=1", *arguments.overrides]
    config = load_config(CONFIG, overrides)
    train, _ = load_splits(config)  # renders the shapes before any clock
    steps = TrainBatches(train.records, config, 0, 1, 0).total_steps
    often = [*overrides, f"storage.checkpoint_steps={steps // (CHECKPOINTS + 1)}"]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        for turn in range(arguments.rounds):
            for way in WAYS:
                if way != "down":
                    server.start()
                words = often if way == "checkpoints" else overrides
                took = fit(words, Path(folder), f"{way}-{turn}", server, way)
                seconds[way].append(took)
                print(f"{way}: {took:.2f} s")
                if way != "down":
                    server.kill()
    off, on, down, kept = (statistics.median(seconds[way]) for way in WAYS)
    checkpoint = (kept - on) / CHECKPOINTS
    figures = {
        "steps": steps,
        "seconds": seconds,
        "on_ratio": on / off,
        "down_ratio": down / off,
        "checkpoint_s": checkpoint,
        "share_of_epoch": checkpoint / EPOCH_SECONDS,
    }
    print(json.dumps(figures, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
