"""Train a detector, tracked in MLflow: `python -m jobs.train CONFIG [key=value ...]`."""

import argparse
import re
import sys
import time
from pathlib import Path

from jobs.console.cli import console, parse, parser, resumable, run, show_table

EXAMPLE = "python -m jobs.train configs/demo.yaml schedule.epochs=3 run.name=first"

REFUSED = 3
"""Exit status where the gate refused what was to be champion."""


def main() -> None:
    """Run the command line."""
    cli = parser(
        "Train a detector and keep its checkpoints, AP and FPS in MLflow.\n\n"
        f"The exit status is {REFUSED} if the training is done, but the gate refused its model.",
        EXAMPLE,
    )
    what = cli.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", help="YAML file, see configs/, or models:/NAME@ALIAS")
    what.add_argument("--like", metavar="RUN_ID", help="train again as this run did")
    cli.add_argument("--resume", action="store_true", help="continue the run run.name")
    cli.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on with other data, code, packages or workers",
    )
    run(train, parse(cli))


def train(arguments: argparse.Namespace) -> None:
    """Train a model, and register it if the configuration names a registered model."""
    from gfl_platform.config import job_of, load_job
    from gfl_platform.registry.model_card import recipe
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store

    if arguments.accept_changes:
        if not arguments.resume:
            raise ValueError("--accept-changes: a new run has no changes; it goes with --resume")
        arguments.overrides.append("run.accept_changes=true")
    source = arguments.config or f"runs:/{arguments.like}"
    digests: dict[str, str] = {}
    if source.startswith(("models:/", "runs:/")):
        where = job_of(arguments.overrides)
        store = Store(where.tracking, Storage(where.storage))
        card_recipe = recipe(where, store, source, arguments.overrides)
        job, digests = card_recipe.job, card_recipe.digests
        for line in card_recipe.differences:
            console.print(f"not as it was then: {line}", soft_wrap=True)
    else:
        job = load_job(source, arguments.overrides)
    if arguments.resume and job.run.name is None:
        raise ValueError("--resume: say which run with run.name=NAME")
    stem = re.sub(r"\W+", "-", source.partition(":/")[2]) or Path(source).stem
    name = job.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    console.print(f"run {name}")
    from gfl.evaluation.coco_eval import format_statistic
    from gfl_platform.training import train
    from jobs.console.progress import Progress

    with Progress() as progress, resumable("jobs.train", name):
        progress.expect(digests)
        result = train.train(job, name, resume=arguments.resume, watch=progress.show)
    rows: dict[str, object] = {k: format_statistic(v) for k, v in result.metrics.items()}
    rows |= {"FPS": result.fps, "run": result.run_id, "checkpoint": result.checkpoint}
    if result.version is not None:
        rows["model"] = f"{job.registry.name} version {result.version}"
    if result.decision:
        rows[result.decision.action] = "\n".join(result.decision.reasons)
    show_table(f"{name}: {result.seconds:.0f} s", rows)
    if result.decision and result.decision.action == "refused":
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
