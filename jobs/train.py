"""Train on a Ray cluster, tracked in MLflow: `python -m jobs.train CONFIG [key=value ...]`."""

import argparse
import time
from pathlib import Path

from jobs.console import Progress, add_overrides, console, parser, run, show_table

EXAMPLE = "python -m jobs.train configs/demo.yaml schedule.epochs=3 run.name=first"


def main() -> None:
    """Run the command line."""
    made = parser("Train a detector and keep its checkpoints, AP and FPS in MLflow.", EXAMPLE)
    made.add_argument("config", help="YAML file, see configs/")
    add_overrides(made)
    made.add_argument("--resume", action="store_true", help="go on with the run called run.name")
    run(train, made.parse_args())


def train(arguments: argparse.Namespace) -> None:
    """Train, and register the model if the configuration names one."""
    from gfl_platform import registry, training
    from gfl_platform.config import load_job

    job = load_job(arguments.config, arguments.overrides)
    if arguments.resume and job.run.name is None:
        raise ValueError("--resume: say which run with run.name=NAME")
    name = job.run.name or f"{Path(arguments.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    console.print(f"run {name}")
    with Progress() as progress:
        result = training.train(job, name, resume=arguments.resume, watch=progress.show)
    with result.tracker:
        rows: dict[str, object] = {
            key: result.metrics[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")
        }
        rows |= {"FPS": result.fps, "run": result.run_id, "checkpoint": result.checkpoint}
        if job.registry.name:
            figures = {"AP": result.metrics["AP"], "fps": result.fps}
            version = registry.register(
                job, job.registry.name, result.checkpoint, result.run_id, figures
            )
            registered = f"{job.registry.name} version {version}"
            if job.registry.alias:
                registry.set_alias(job, job.registry.name, version, job.registry.alias)
                registered += f" @{job.registry.alias}"
            rows["model"] = registered
    show_table(f"{name}: {result.seconds:.0f} s", rows)


if __name__ == "__main__":
    main()
