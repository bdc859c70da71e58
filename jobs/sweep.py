"""Search over keys of the configuration: `python -m jobs.sweep CONFIG [key=value ...]`."""

import argparse
import time
from pathlib import Path

from jobs.console.cli import console, parse, parser, resumable, run

EXAMPLE = "python -m jobs.sweep configs/sweeps/beta_bins_demo.yaml run.name=first"


def main() -> None:
    """Run the command line."""
    cli = parser("Train the points of the sweep: section, and report which are best.", EXAMPLE)
    cli.add_argument("config", help="YAML file with a sweep: section, see configs/sweeps/")
    cli.add_argument("--resume", action="store_true", help="continue the sweep run.name")
    cli.add_argument(
        "--register", metavar="NAME", help="register the best trial's model as NAME@challenger"
    )
    run(sweep, parse(cli))


def sweep(arguments: argparse.Namespace) -> None:
    """Run the sweep and show its results."""
    from gfl_platform.config import load_job

    register = [f"registry.name={arguments.register}"] if arguments.register else []
    job = load_job(arguments.config, [*arguments.overrides, *register])
    if arguments.resume and job.run.name is None:
        raise ValueError("--resume: say which sweep with run.name=NAME")
    name = job.run.name or f"{Path(arguments.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    console.print(f"sweep {name}")
    from gfl_platform.storage.storage import Storage
    from gfl_platform.sweeps.run import register_best, run_sweep
    from jobs.console.progress import SweepProgress
    from jobs.console.tables import show_sweep

    with resumable("jobs.sweep", name):
        with SweepProgress() as progress:
            results = run_sweep(job, name, resume=arguments.resume, watch=progress.show_trial)
        show_sweep(results)
        report = Storage(job.storage).root / "sweeps" / name / "report" / "report.html"
        console.print(f"report: {report}")
        if model := job.registry.name:
            console.print(f"{model}@challenger is version {register_best(results, model)}")


if __name__ == "__main__":
    main()
