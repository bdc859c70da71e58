"""Predictions on image files, prepared as in evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gfl.checkpoint import About
from gfl.data.loading import Sample, collate
from gfl.data.transforms import as_sample, build_transforms, read_image
from gfl.detector import Detector
from gfl.evaluation import coco_records
from gfl.postprocess import Predictions
from gfl.visualize import draw_predictions

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


class Predictor:
    """A detector and what is needed to use it on images."""

    def __init__(self, detector: Detector, about: About) -> None:
        self.about = about
        self._detector = detector.eval()
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
        return self._detector.predict(inputs, batch.targets.sizes, batch.original_sizes)[0]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among `paths` and in the folders among them, sorted.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    files = []
    for path in paths:
        if path.is_dir():
            found = [f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise ValueError(
                    f"{path}: no images; expected files {', '.join(sorted(IMAGE_SUFFIXES))}"
                )
            files += sorted(found)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such image or folder")
    return files


def write_predictions(
    predictor: Predictor, files: Sequence[Path], folder: Path, min_score: float
) -> int:
    """Predict on image `files` and return the number of detections.

    Writes `predictions.json` (COCO's layout: images, categories, annotations with a score) and a
    picture of every image, on which detections of at least `min_score` are drawn, into `folder`.
    """
    about = predictor.about
    folder.mkdir(parents=True, exist_ok=True)
    images, records = [], []
    for number, file in enumerate(files, start=1):
        pixels = read_image(file)
        found = predictor.predict(pixels)
        _, height, width = pixels.shape
        images.append({"id": number, "file_name": str(file), "height": height, "width": width})
        records += coco_records(found, number, about.category_ids)
        picture = folder / f"{number:06d}-{file.stem}.png"
        draw_predictions([pixels], [found], about.classes, picture, min_score)
    names = zip(about.category_ids, about.classes, strict=True)
    categories = [{"id": identity, "name": name} for identity, name in names]
    content = {"images": images, "categories": categories, "annotations": records}
    (folder / "predictions.json").write_text(json.dumps(content, indent=1) + "\n")
    return len(records)
