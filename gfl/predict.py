"""Predictions on image files, prepared as in evaluation."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfl.checkpoint import About
from gfl.data.images import list_images, read_image
from gfl.data.loading import Sample, collate
from gfl.data.transforms import as_sample, build_transforms
from gfl.detector import Detector, place
from gfl.postprocess import Predictions, coco_records, coco_rows
from gfl.visualize import draw_predictions


class Predictor:
    """A detector and what is needed to use it on images."""

    def __init__(self, detector: Detector, about: About) -> None:
        self.about = about
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._detector = place(detector.eval(), device)
        self._transforms = build_transforms(detector.config.data, training=False)

    def predict(self, image: Path | Tensor) -> Predictions:
        """Return the detections of an image file, or of RGB pixels (3, H, W), uint8.

        Boxes are in px of that image.

        Raises:
            DataError: a file that is missing or no image.
        """
        pixels = read_image(image) if isinstance(image, Path) else image
        resized, _ = self._transforms(*as_sample(pixels, torch.zeros(0, 4)))
        height, width = pixels.shape[-2:]
        no_boxes, no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        sample = Sample(resized.as_subclass(Tensor), no_boxes, no_labels, 0, (height, width))
        batch = collate([sample]).to(self._detector.pixel_mean.device)
        inputs = self._detector.normalize(batch.pixels, batch.targets.sizes)
        (found,) = self._detector.predict(inputs, batch.targets.sizes, batch.original_sizes)
        return found.cpu()


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among `paths` and in the folders among them, sorted.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += list_images(path)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such image or folder")
    return files


def write_predictions(
    predictor: Predictor, files: Iterable[Path], folder: Path, min_score: float
) -> dict[str, int]:
    """Predict on image `files` and return the number of detections of every class found.

    Writes `predictions.json` (a COCO dataset whose annotations have a `score` and an `edge_std`)
    and a picture of every image, on which detections of at least `min_score` are drawn.
    """
    about = predictor.about
    images: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for number, file in enumerate(files, start=1):
        pixels = read_image(file)
        found = predictor.predict(pixels)
        folder.mkdir(parents=True, exist_ok=True)
        _, height, width = pixels.shape
        images.append({"id": number, "file_name": str(file), "height": height, "width": width})
        detections = coco_records(coco_rows(found, number, about.category_ids))
        for detection, edge_std in zip(detections, found.edge_std.tolist(), strict=True):
            _, _, w, h = detection["bbox"]
            extra = {"id": len(records) + 1, "area": w * h, "iscrowd": 0, "edge_std": edge_std}
            records.append(detection | extra)
        picture = folder / f"{number:06d}-{file.stem}.png"
        draw_predictions([pixels], [found], about.classes, picture, min_score)
    names = zip(about.category_ids, about.classes, strict=True)
    categories: list[dict[str, Any]] = [{"id": identity, "name": name} for identity, name in names]
    content = {"images": images, "categories": categories, "annotations": records}
    (folder / "predictions.json").write_text(json.dumps(content, indent=1) + "\n")
    counts = Counter(record["category_id"] for record in records)
    return {category["name"]: counts[category["id"]] for category in categories}
