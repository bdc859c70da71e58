"""What Ray and MLflow add: the same training by `jobs.train`'s code and by plain `torchrun`.

Two workers on one machine. The plain loop keeps a checkpoint of every epoch, as Ray does.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CONFIG = "configs/demo.yaml"
OVERRIDES = ("schedule.epochs=2", "data.shapes.val=40", "data.shapes.folder=outputs/data/overhead",
             "data.train.images=outputs/data/overhead/train/images",
             "data.train.annotations=outputs/data/overhead/train/annotations.json",
             "data.val.images=outputs/data/overhead/val/images",
             "data.val.annotations=outputs/data/overhead/val/annotations.json")  # fmt: skip
WORKERS = 2


def compare() -> dict[str, dict[str, float]]:
    """Return wall time, images a second while training, and time beside training, of both."""
    from gfl.config.loader import load_config
    from gfl.data.split import load_splits

    load_splits(load_config(CONFIG, OVERRIDES))  # renders the shapes before any clock
    with tempfile.TemporaryDirectory() as folder:
        return {"torchrun": _torchrun(Path(folder)), "Ray": _ray(Path(folder))}


def _torchrun(folder: Path) -> dict[str, float]:
    out = folder / "plain.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={WORKERS}", "-m", "benchmarks.ray_overhead", str(out)]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return _summary(time.perf_counter() - start, json.loads(out.read_text()))


def _ray(folder: Path) -> dict[str, float]:
    from gfl_platform.cluster.events import Event, StepsDone
    from gfl_platform.config import load_job
    from gfl_platform.training.train import train

    rates: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepsDone):
            rates.append(event.metrics["images_per_second"])

    where = [f"storage.root={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    job = load_job(CONFIG, [*OVERRIDES, *where, f"cluster.workers={WORKERS}"])
    start = time.perf_counter()
    train(job, "overhead", resume=False, watch=watch)
    return _summary(time.perf_counter() - start, rates)


def _summary(seconds: float, rates: Sequence[float]) -> dict[str, float]:
    rates = rates[1:]  # the first windows are warm-up
    return {"seconds": seconds, "images_per_second": len(rates) / sum(1 / rate for rate in rates)}


def plain_worker(out: Path) -> None:
    """Train as one of `torchrun`'s workers."""
    import torch
    import torch.distributed as dist

    from gfl.config.loader import load_config
    from gfl.data.split import load_splits
    from gfl.evaluation.speed import measure_fps
    from gfl.train.engine import CheckpointReport, EpochReport, FitOptions, StepReport, fit

    rates: list[float] = []

    class Keeper:
        def on_steps(self, report: StepReport) -> None:
            rates.append(report.metrics["images_per_second"])

        def on_checkpoint(self, report: CheckpointReport) -> None:
            raise AssertionError

        def on_epoch(self, report: EpochReport) -> None:
            if dist.get_rank() == 0:
                report.snapshot().write(out.parent)

    dist.init_process_group("gloo")
    config = load_config(CONFIG, OVERRIDES)
    splits, device = load_splits(config), torch.device("cpu")
    trainer = fit(config, splits, Keeper(), FitOptions(device, out.parent))
    if dist.get_rank() == 0:
        measure_fps(trainer.model, splits[1], config, device)
        out.write_text(json.dumps(rates))
    dist.destroy_process_group()


if __name__ == "__main__":
    plain_worker(Path(sys.argv[1]))
