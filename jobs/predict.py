"""Detect objects in images: `python -m jobs.predict MODEL IMAGE|FOLDER ...`."""

import argparse
from pathlib import Path

from jobs.console import console, parse, parser, run, show_table

EXAMPLE = (
    "python -m jobs.predict models:/gfl-demo@champion street.jpg photos/ --out outputs/predictions"
)


def main() -> None:
    """Run the command line."""
    made = parser(
        "Detect objects in images: COCO JSON and pictures with boxes and edge uncertainty.", EXAMPLE
    )
    made.add_argument(
        "model", help="checkpoint folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID"
    )
    made.add_argument("images", nargs="+", type=Path, help="image files and folders of them")
    made.add_argument("--out", type=Path, default=Path("outputs/predictions"), metavar="FOLDER")
    made.add_argument("--min-score", type=float, default=0.3, help="of drawn boxes (default 0.3)")
    run(predict, parse(made))


def predict(arguments: argparse.Namespace) -> None:
    """Predict on every image; write `predictions.json` and a picture of each."""
    from rich.progress import track

    from gfl.checkpoint import load_checkpoint, read_config
    from gfl.configfile import derive
    from gfl.data.images import read_image
    from gfl.predict import Predictor, image_files, write_predictions
    from gfl_platform import registry
    from gfl_platform.config import JobConfig, job_of
    from gfl_platform.storage import scratch_folder

    files = image_files(arguments.images)
    for file in files:
        read_image(file)  # a damaged one is said before anything is written
    where = job_of(arguments.overrides)
    with scratch_folder(where) as scratch:
        checkpoint = registry.fetch_checkpoint(where, arguments.model, scratch)
        job = derive(JobConfig, read_config(checkpoint), arguments.overrides)
        predictor = Predictor(*load_checkpoint(checkpoint, job))
    shown = track(files, "predicting", console=console, disable=not console.is_terminal)
    found = write_predictions(predictor, shown, arguments.out, arguments.min_score)
    show_table(arguments.model, {"images": len(files), **found, "written to": arguments.out})


if __name__ == "__main__":
    main()
