"""Measure AP and FPS of a model on a Ray cluster: `python -m jobs.evaluate MODEL`."""

import argparse
import json
from pathlib import Path

from jobs.console.cli import parse, parser, run, show_table

EXAMPLE = "python -m jobs.evaluate models:/gfl-demo@champion postprocess.nms_iou=0.5"


def main() -> None:
    """Run the command line."""
    cli = parser("Measure AP and FPS of a model on the images it is evaluated on.", EXAMPLE)
    cli.add_argument(
        "model", help="checkpoint folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID"
    )
    cli.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    cli.add_argument("--results", type=Path, metavar="FILE", help="write detections as COCO JSON")
    cli.add_argument("--per-class", action="store_true", help="also show the AP of every class")
    cli.add_argument(
        "--official", action="store_true", help="measure AP with pycocotools: slower, equal figures"
    )
    run(evaluate, parse(cli))


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a model with the configuration it was trained with, changed by the overrides."""
    from gfl.checkpoint.files import read_config
    from gfl.config.loader import derive
    from gfl.evaluation.coco_eval import format_statistic
    from gfl.files import write_atomically
    from gfl_platform.config import JobConfig, job_of
    from gfl_platform.evaluation.evaluate import evaluate_checkpoint
    from gfl_platform.registry import models
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store
    from jobs.console.progress import Progress

    where = job_of(arguments.overrides)
    store = Store(where.tracking, Storage(where.storage))
    with store.storage.scratch_folder() as scratch, Progress() as progress:
        checkpoint = models.fetch_checkpoint(store, arguments.model, scratch)
        job = derive(JobConfig, read_config(checkpoint), arguments.overrides)
        figures = evaluate_checkpoint(
            checkpoint,
            job,
            progress.show,
            official=arguments.official,
            results=arguments.results,
        )
    del figures["detections"]
    if arguments.out:
        write_atomically(arguments.out, json.dumps(figures, indent=1) + "\n")
    by_iou = {f"AP at IoU {iou}": ap for iou, ap in figures["ap_by_iou"].items()}
    statistics = figures["metrics"] | by_iou
    rows: dict[str, object] = {name: format_statistic(ap) for name, ap in statistics.items()}
    rows |= {"FPS": figures["fps"], "images": figures["images"]}
    show_table(f"{arguments.model} on {job.data.val.annotations}", rows)
    if arguments.per_class:
        by_class = sorted(figures["ap_by_class"].items(), key=lambda item: -item[1])
        show_table("AP of every class", {name: format_statistic(ap) for name, ap in by_class})


if __name__ == "__main__":
    main()
