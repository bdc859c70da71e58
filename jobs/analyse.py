"""Show what a model does on its evaluation images: `python -m jobs.analyse MODEL`."""

import argparse
from pathlib import Path

from jobs.console.cli import console, parse, parser, run

EXAMPLE = "python -m jobs.analyse models:/gfl-demo@champion --out analysis"


def main() -> None:
    """Run the command line."""
    cli = parser(
        "Write a report of what a model does on the images it is evaluated on: errors and what "
        "they cost, working thresholds, confusion, calibration, edges, pictures.",
        EXAMPLE,
    )
    named = "checkpoint folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID"
    cli.add_argument("model", help=named)
    cli.add_argument("other", nargs="?", help="another model to compare with, on the same images")
    cli.add_argument(
        "--out", type=Path, default=Path("analysis"), metavar="FOLDER",
        help="folder of report.html, figures and tables (default: %(default)s)",
    )  # fmt: skip
    run(analyse, parse(cli))


def analyse(arguments: argparse.Namespace) -> None:
    """Analyse a model with the configuration it was trained with, changed by the overrides."""
    from gfl.checkpoint.files import read_config
    from gfl.config.loader import derive
    from gfl_platform.config import JobConfig, job_of
    from gfl_platform.evaluation.analyse import analyse_checkpoint, write_files
    from gfl_platform.evaluation.evaluate import evaluate_checkpoint
    from gfl_platform.registry import models
    from gfl_platform.registry.measurement import at_settings_of
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store
    from jobs.console.progress import Progress

    where = job_of(arguments.overrides)
    store = Store(where.tracking, Storage(where.storage))
    with store.storage.scratch_folder() as scratch, Progress() as progress:
        checkpoint = models.fetch_checkpoint(store, arguments.model, scratch / "model")
        job = derive(JobConfig, read_config(checkpoint), arguments.overrides)
        other = None
        if arguments.other:
            second = models.fetch_checkpoint(store, arguments.other, scratch / "other")
            other_job = derive(JobConfig, read_config(second), arguments.overrides)
            figures = evaluate_checkpoint(second, at_settings_of(other_job, job), progress.show)
            other = arguments.other, figures["detections"]
        files = analyse_checkpoint(
            checkpoint, job, progress.show, store.storage, arguments.model, other
        )
    write_files(files, arguments.out)
    console.print(f"analysis: {arguments.out / 'report.html'}", soft_wrap=True)
    if run_id := models.run_of(store, arguments.model):
        store.client.log_artifacts(run_id, str(arguments.out), "analysis")
        console.print(f"kept with the run: runs:/{run_id}/analysis", soft_wrap=True)


if __name__ == "__main__":
    main()
