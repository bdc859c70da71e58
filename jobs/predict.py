"""Detect objects in images: `python -m jobs.predict MODEL IMAGE|FOLDER ...`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.console.cli import parse, parser, run, show_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gfl.inference.detections import Detections

EXAMPLE = (
    "python -m jobs.predict models:/gfl-demo@champion street.jpg photos/ --out outputs/predictions"
)


def main() -> None:
    """Run the command line."""
    cli = parser(
        "Detect objects in images: COCO JSON and pictures with boxes and edge uncertainty.", EXAMPLE
    )
    cli.add_argument(
        "model", help="checkpoint folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID"
    )
    cli.add_argument("images", nargs="+", type=Path, help="image files and folders of them")
    cli.add_argument("--out", type=Path, default=Path("outputs/predictions"), metavar="FOLDER")
    cli.add_argument(
        "--min-score", type=float, default=0.3, help="lowest score of drawn boxes (default 0.3)"
    )
    cli.add_argument(
        "--format", choices=("coco", "yolo"), default="coco", help="format of the detection files"
    )
    cli.add_argument("--batch", type=int, default=1, help="images per forward pass")
    cli.add_argument(
        "--flip", action="store_true", help="test-time augmentation: add mirrored images"
    )
    cli.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        help="test-time augmentation: image scales",
    )
    cli.add_argument(
        "--tiles",
        type=int,
        nargs=2,
        metavar=("SIZE", "OVERLAP"),
        help="detect in tiles, in px (default: data.tiles of the model's configuration)",
    )
    run(predict, parse(cli))


def predict(arguments: argparse.Namespace) -> None:
    """Detect objects in every image; write `predictions.json` and one picture per image."""
    import gfl
    from gfl.checkpoint.files import read_config
    from gfl.config.loader import derive
    from gfl.data.images import read_image
    from gfl.inference.detections import require_own_names, write_detections
    from gfl.inference.predictor import image_files
    from gfl_platform.cluster.events import ItemsDone
    from gfl_platform.config import JobConfig, job_of
    from gfl_platform.registry import models
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store
    from jobs.console.progress import Progress

    files = image_files(arguments.images)
    if arguments.format == "yolo":
        require_own_names(files)
    for file in files:
        read_image(file)  # a damaged file is an error before anything is written
    where = job_of(arguments.overrides)
    store = Store(where.tracking, Storage(where.storage))
    with store.storage.scratch_folder() as scratch:
        checkpoint = models.fetch_checkpoint(store, arguments.model, scratch)
        job = derive(JobConfig, read_config(checkpoint), arguments.overrides)
        model = gfl.load(checkpoint, job)
    with Progress() as progress:

        def shown() -> "Iterator[Detections]":
            stream = model.stream(
                files,
                batch=arguments.batch,
                flip=arguments.flip,
                scales=arguments.scales,
                tiles=tuple(arguments.tiles) if arguments.tiles else True,
            )
            for number, detections in enumerate(stream, start=1):
                yield detections
                progress.show(ItemsDone("images predicted", number, len(files)))

        counts = write_detections(shown(), arguments.out, arguments.format, arguments.min_score)
    show_table(arguments.model, {"images": len(files), **counts, "written to": arguments.out})


if __name__ == "__main__":
    main()
