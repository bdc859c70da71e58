"""Detect objects in images: `python -m jobs.predict MODEL IMAGE|FOLDER ...`."""

import argparse
import json
from pathlib import Path

from jobs.console import console, parser, run

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
    made.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="storage.root, tracking.uri"
    )
    run(predict, made.parse_args())


def predict(arguments: argparse.Namespace) -> None:
    """Predict on every image; write `predictions.json` and a picture of each."""
    from gfl.config import Config, derive
    from gfl.data.transforms import read_image
    from gfl.evaluation import coco_records
    from gfl.predict import Predictor, image_files
    from gfl.visualize import draw_predictions
    from gfl_platform import registry
    from gfl_platform.config import JobConfig
    from gfl_platform.storage import write_atomically

    files = image_files(arguments.images)
    predictor = Predictor(
        *registry.load(derive(JobConfig, Config(), arguments.set), arguments.model)
    )
    about = predictor.about
    arguments.out.mkdir(parents=True, exist_ok=True)
    images, records = [], []
    for number, file in enumerate(files, start=1):
        pixels = read_image(file)
        found = predictor.predict(pixels)
        images.append(
            {
                "id": number,
                "file_name": str(file),
                "height": pixels.shape[1],
                "width": pixels.shape[2],
            }
        )
        records += coco_records(found, number, about.category_ids)
        picture = arguments.out / f"{number:06d}-{file.stem}.png"
        draw_predictions([pixels], [found], about.classes, picture, arguments.min_score)
    categories = [
        {"id": identity, "name": name}
        for identity, name in zip(about.category_ids, about.classes, strict=True)
    ]
    content = {"images": images, "categories": categories, "annotations": records}
    write_atomically(arguments.out / "predictions.json", json.dumps(content, indent=1) + "\n")
    console.print(f"{len(files)} images, {len(records)} detections: {arguments.out}")


if __name__ == "__main__":
    main()
