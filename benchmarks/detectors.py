"""Times detectors side by side: a process each, which take turns, so that drift falls on all."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.cases import parse
from benchmarks.ours import stirred

OURS = "ours:build"
TORCHVISION = {
    "FCOS": "torchvision_detectors:build_fcos",
    "RetinaNet": "torchvision_detectors:build_retinanet",
}
MMDETECTION = "mmdetection:build"
ROOT = Path(__file__).parent.parent


class Contender:
    """A process that does the work of one case when it is told to."""

    def __init__(
        self, python: str, which: str, case: str, device: torch.device, weights: Path | None
    ) -> None:
        words = [python, "-m", "benchmarks.worker", which, case, "--device", str(device)]
        words += ["--threads", str(torch.get_num_threads())]
        words += [] if weights is None else ["--weights", str(weights)]
        # Of another Python: without what this one adds to its path.
        settings = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
        self._process = subprocess.Popen(
            words, cwd=ROOT, env=settings, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def __enter__(self) -> Self:
        self._read("ready")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def run(self) -> None:
        """Do the work once, and note how long it took."""
        found = self.ask("run", "seconds")
        self.seconds.append(found["seconds"])
        self.cpu_seconds.append(found["cpu_seconds"])

    def ask(self, command: str, key: str = "") -> dict[str, Any]:
        """Return the answer to a command, which has `key`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._read(key)

    def close(self) -> dict[str, Any]:
        """End the process; return its peak of memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = self._read("peak_bytes")
        self._process.stdin = None
        return found

    def _read(self, key: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print, too
                answer: dict[str, Any] = json.loads(line)
                if not key or key in answer:
                    return answer
        raise RuntimeError(f"{self._process.args}: ended without an answer; see its error above")


def compare(
    case: str, device: torch.device, rounds: int, peer: str | None, others: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Return seconds, counts and memory of every detector at a case, by its name.

    Args:
        case: See `cases.CASES`.
        device: Where.
        rounds: How often each runs.
        peer: A Python that has mmdet.
        others: Which of `TORCHVISION` take part; they have no losses of their own to time.
    """
    work = parse(case).work
    contenders = {"GFL": (sys.executable, OURS)}
    if work != "loss":
        contenders |= {name: (sys.executable, TORCHVISION[name]) for name in others}
    if peer is not None:
        contenders["MMDetection"] = (peer, MMDETECTION)
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = stirred(Path(folder))
        weights = {"GFL": mine, "MMDetection": theirs} if work == "predict" else {}
        processes = {
            name: Contender(python, which, case, device, weights.get(name))
            for name, (python, which) in contenders.items()
        }
        found = {}
        try:
            for process in processes.values():
                process.__enter__()
            for _ in range(rounds):
                for process in processes.values():
                    process.run()
            for name, process in processes.items():
                found[name] = {
                    "median_s": statistics.median(process.seconds),
                    "cpu_median_s": statistics.median(process.cpu_seconds),
                    "seconds": process.seconds,
                    **process.ask("count", "operations"),
                }
            if work == "predict" and peer is not None:
                found["GFL"]["boxes_px"] = _difference(processes, Path(folder))
            for name, process in processes.items():
                found[name] |= process.close()
        finally:
            for process in processes.values():
                process.__exit__()
    return found


def _difference(processes: dict[str, Contender], folder: Path) -> dict[str, float]:
    """Return how many detections there are, and how far ours are from MMDetection's at most."""
    for name in ("GFL", "MMDetection"):
        processes[name].ask(f"found {folder / name}.boxes")
    ours, theirs = (
        torch.load(folder / f"{name}.boxes", weights_only=True)[0]
        for name in ("GFL", "MMDetection")
    )
    if ours.shape != theirs.shape:
        return {"ours": len(ours), "theirs": len(theirs), "largest": float("inf")}
    # Of equal scores the order is anyone's.
    nearest = torch.cdist(
        ours.double(), theirs.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return {
        "ours": len(ours), "theirs": len(theirs), "largest": float(nearest.amin(dim=1).amax())
    }  # fmt: skip
