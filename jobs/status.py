"""Show the progress of a run: `python -m jobs.status NAME`."""

import argparse

from jobs.console.cli import parse, parser, run, show_table

EXAMPLE = "python -m jobs.status first storage.root=/shared/outputs"


def main() -> None:
    """Run the command line."""
    cli = parser("Show the progress of a run: epoch, AP, time left, restarts, backlog.", EXAMPLE)
    cli.add_argument("name", help="run.name")
    cli.add_argument(
        "--deliver",
        action="store_true",
        help="send waiting events to MLflow; only while no driver runs",
    )
    run(status, parse(cli))


def status(arguments: argparse.Namespace) -> None:
    """Print the status of a run; with --deliver, send its waiting events to MLflow."""
    from gfl_platform.config import job_of
    from gfl_platform.storage.files import held
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.status import read_status

    job = job_of(arguments.overrides)
    storage = Storage(job.storage)
    folder = storage.open_run_folder(arguments.name, resume=True)
    if arguments.deliver:
        from gfl_platform.tracking.client import Store
        from gfl_platform.tracking.run import settle

        with held(folder):
            settle(Store(job.tracking, storage), folder)
    show_table(arguments.name, read_status(folder))


if __name__ == "__main__":
    main()
