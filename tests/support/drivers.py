"""What tests that kill need: a cluster of several nodes, and a driver in a process of its own."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path


@contextlib.contextmanager
def cluster_of(nodes):
    """A cluster whose head has no CPU, and nodes of one; a dead one is noticed within seconds."""
    from ray.cluster_utils import Cluster

    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000,
              "health_check_failure_threshold": 3}  # fmt: skip
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": system})
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()


def training_processes(cluster):
    """Return pid and node of every process that trains on a cluster."""
    raylets = {n.all_processes["raylet"][0].process.pid: n for n in cluster.worker_nodes}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent in raylets:
                    found.append((int(folder.name), raylets[parent]))
    assert found, "no training process"
    return sorted(found, key=lambda pair: pair[0])


class Driver:
    """`jobs.train` in a process of its own; `status` is where it notes where it stands."""

    def __init__(self, words, name, folder, status):
        self.words, self._status = [*words, f"run.name={name}"], status
        self._log, self.process = folder / f"{name}.log", None

    def start(self, *more):
        command = [sys.executable, "-m", "jobs.train", *self.words, *more]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def status(self):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return json.loads(self._status.read_text())
        return {}

    def wait_for(self, condition, seconds=120):
        """Return the status once `condition` holds of it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (found := self.status()) and condition(found):
                return found
            assert self.process.poll() is None, self.log()
            time.sleep(0.1)
        raise AssertionError(f"{self.status()}\n{self.log()}")

    def steps_again(self, workers=None, *, restarted=False):
        """Wait until training has gone on, by so many; return the seconds and the step."""
        started, before = time.monotonic(), self.status()
        restarts = before.get("restarts", 0) + restarted
        found = self.wait_for(
            lambda s: (
                s["state"] == "training"
                and s["time"] > before["time"]
                and s.get("restarts", 0) >= restarts
                and workers in (None, s["workers"])
            )
        )
        return time.monotonic() - started, found["step"]

    def log(self):
        return self._log.read_text()[-3000:]
