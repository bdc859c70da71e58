"""Detect objects in images: `python -m jobs.predict MODEL IMAGE|FOLDER ...`."""

import argparse
from pathlib import Path

from jobs.console import console, parse, parser, run

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
    from gfl.config import Config, derive
    from gfl.predict import Predictor, image_files, write_predictions
    from gfl_platform import registry
    from gfl_platform.config import JobConfig

    files = image_files(arguments.images)
    job = derive(JobConfig, Config(), arguments.overrides)
    predictor = Predictor(*registry.load(job, arguments.model))
    found = write_predictions(predictor, files, arguments.out, arguments.min_score)
    console.print(f"{len(files)} images, {found} detections: {arguments.out}")


if __name__ == "__main__":
    main()
