"""Files of detections: a COCO dataset or YOLO text files, and a picture of each image."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gfl.data.images import read_image
from gfl.inference.detections import Detections
from gfl.inference.visualize import draw_predictions

Format = Literal["coco", "yolo"]


def write_detections(
    found: Sequence[Detections], folder: Path, form: Format, min_score: float
) -> dict[str, int]:
    """Write the detections in image files and pictures of them; return the number by class.

    `coco` is `predictions.json`, a dataset whose annotations have a `score` and an `edge_std`;
    `yolo` is a text file for each image, named as it is, and `classes.txt`.

    Args:
        found: In one image each, which is a file.
        folder: Made if it does not exist.
        form: Of the files.
        min_score: Of the detections that are drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (_write_coco if form == "coco" else _write_yolo)(found, folder)
    for number, each in enumerate(found, start=1):
        picture = folder / f"{number:06d}-{Path(each.source).stem}.png"
        pixels = read_image(Path(each.source))
        draw_predictions([pixels], [each.predictions], each.classes, picture, min_score)
    counts = Counter(name for each in found for name in each.names)
    return {name: counts[name] for name in found[0].classes}


def require_own_names(files: Sequence[Path]) -> None:
    """Refuse images whose YOLO files would be one.

    Raises:
        ValueError: two of them have the same name but for folder and ending.
    """
    stem, count = Counter(file.stem for file in files).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{stem}: {count} images have this name, so that YOLO's files would be one; predict "
            "each into a folder of its own, or choose --format coco"
        )


def _write_coco(found: Sequence[Detections], folder: Path) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, each in enumerate(found, start=1):
        height, width = each.size
        images.append({"id": number, "file_name": each.source, "height": height, "width": width})
        for record in each.to_coco(number):
            _, _, w, h = record["bbox"]
            extra = {"id": len(annotations) + 1, "area": w * h, "iscrowd": 0}
            annotations.append(record | extra)
    named = zip(found[0].category_ids, found[0].classes, strict=True)
    categories = [{"id": identity, "name": name} for identity, name in named]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "predictions.json").write_text(json.dumps(content, indent=1) + "\n")


def _write_yolo(found: Sequence[Detections], folder: Path) -> None:
    for each in found:
        (folder / f"{Path(each.source).stem}.txt").write_text(each.to_yolo())
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in found[0].classes))
