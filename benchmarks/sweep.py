"""What a sweep adds to its trainings: `python -m benchmarks.sweep`, a quarter of an hour.

The same one-worker trainings, by `jobs.sweep` and by plain loops, one process per CPU. A plain loop
trains with `gfl.train.engine.fit` and keeps the checkpoints; no Ray, no MLflow, no report.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gfl.train.engine import CheckpointReport, EpochReport, StepReport

CONFIG = "configs/sweeps/demo_trial.yaml"
BETAS = (0, 1, 2, 4)


class Keeper:
    """Keeps the checkpoint of every epoch, as Ray does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_steps(self, report: StepReport) -> None:
        """Nothing."""

    def on_checkpoint(self, report: CheckpointReport) -> None:
        """Nothing: sweeps keep none within an epoch."""

    def on_epoch(self, report: EpochReport) -> None:
        """Save a checkpoint over the one before."""
        report.snapshot().write(self._folder)


def plain_loop(betas: Sequence[float], overrides: Sequence[str]) -> None:
    """Train one after the other in this process."""
    import torch

    from gfl.config.loader import load_config
    from gfl.config.schema import Config
    from gfl.data.split import load_splits
    from gfl.evaluation.speed import measure_fps
    from gfl.train.engine import FitOptions, fit

    torch.set_num_threads(1)
    for beta in betas:
        config: Config = load_config(CONFIG, [*overrides, f"loss.qfl.beta={beta}"])
        splits = load_splits(config)
        device = torch.device("cpu")
        with tempfile.TemporaryDirectory() as folder:
            keeper = Keeper(Path(folder))
            trainer = fit(config, splits, keeper, FitOptions(device, Path(folder)))
            measure_fps(trainer.model, splits[1], config, device)


def sweep(overrides: Sequence[str]) -> None:
    """Train the same by a sweep."""
    from gfl_platform.config import load_job
    from gfl_platform.sweeps.run import run_sweep

    with tempfile.TemporaryDirectory() as root:
        space = f"sweep={{space: {{loss.qfl.beta: {{grid: {list(BETAS)}}}}}}}"
        job = load_job(CONFIG, [*overrides, f"storage.root={root}", space])
        run_sweep(job, "benchmark", resume=False, watch=lambda *_: None)


def main() -> None:
    """Print both times and their ratio."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("overrides", nargs="*", help="key=value, such as schedule.epochs=6")
    made.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = made.parse_args()
    from gfl.config.loader import load_config
    from gfl.data.split import load_splits

    load_splits(load_config(CONFIG, arguments.overrides))  # renders the shapes before any clock
    slots = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    loops = [
        context.Process(target=plain_loop, args=(BETAS[slot::slots], arguments.overrides))
        for slot in range(slots)
    ]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    plain = time.perf_counter() - start
    start = time.perf_counter()
    sweep(arguments.overrides)
    swept = time.perf_counter() - start
    figures = {"trials": len(BETAS), "slots": slots, "plain_s": plain, "sweep_s": swept}
    figures["ratio"] = swept / plain
    print(json.dumps(figures, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
