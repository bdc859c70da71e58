"""Measure a model's AP and FPS with Ray: `python -m jobs.evaluate MODEL [key=value ...]`."""

import argparse
import json
import tempfile
from pathlib import Path

from jobs.console import parse, parser, run, show_table

EXAMPLE = "python -m jobs.evaluate models:/gfl-demo@champion data.val_batch=10"


def main() -> None:
    """Run the command line."""
    made = parser("Measure AP and FPS of a model on the images it is evaluated on.", EXAMPLE)
    made.add_argument(
        "model", help="checkpoint folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID"
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    run(evaluate, parse(made))


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a model with the configuration it was trained with, changed by the overrides."""
    from gfl.checkpoint import read_config
    from gfl.config import Config, derive
    from gfl_platform import registry
    from gfl_platform.config import JobConfig
    from gfl_platform.evaluating import evaluate_checkpoint
    from gfl_platform.storage import write_atomically

    where = derive(JobConfig, Config(), arguments.overrides)
    with tempfile.TemporaryDirectory(prefix="gfl-evaluate-") as scratch:
        checkpoint = registry.fetch_checkpoint(where, arguments.model, Path(scratch))
        job = derive(JobConfig, read_config(checkpoint), arguments.overrides)
        figures = evaluate_checkpoint(checkpoint, job)
    if arguments.out:
        write_atomically(arguments.out, json.dumps(figures, indent=1) + "\n")
    rows = {**figures["metrics"], "FPS": figures["fps"], "images": figures["images"]}
    show_table(f"{arguments.model} on {job.data.val.annotations}", rows)


if __name__ == "__main__":
    main()
