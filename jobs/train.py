"""Train a detector, tracked in MLflow: `python -m jobs.train CONFIG [key=value ...]`."""

import argparse
import time
from pathlib import Path

from jobs.console import Progress, console, parse, parser, resumable, run, show_table

EXAMPLE = "python -m jobs.train configs/demo.yaml schedule.epochs=3 run.name=first"


def main() -> None:
    """Run the command line."""
    made = parser("Train a detector and keep its checkpoints, AP and FPS in MLflow.", EXAMPLE)
    made.add_argument("config", help="YAML file, see configs/")
    made.add_argument("--resume", action="store_true", help="go on with the run called run.name")
    run(train, parse(made))


def train(arguments: argparse.Namespace) -> None:
    """Train, and register the model if the configuration names one."""
    from gfl_platform.config import load_job

    job = load_job(arguments.config, arguments.overrides)
    if arguments.resume and job.run.name is None:
        raise ValueError("--resume: say which run with run.name=NAME")
    name = job.run.name or f"{Path(arguments.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    console.print(f"run {name}")
    from gfl_platform import training  # brings Ray, which takes seconds

    with Progress() as progress, resumable("jobs.train", name):
        result = training.train(job, name, resume=arguments.resume, watch=progress.show)
    rows: dict[str, object] = {**result.metrics, "FPS": result.fps, "run": result.run_id}
    rows["checkpoint"] = result.checkpoint
    if result.version is not None:
        alias = f" @{job.registry.alias}" if job.registry.alias else ""
        rows["model"] = f"{job.registry.name} version {result.version}{alias}"
    show_table(f"{name}: {result.seconds:.0f} s", rows)


if __name__ == "__main__":
    main()
