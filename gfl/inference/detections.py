"""Detections: the result for one image, its conversions for other tools, and files of several."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from gfl.data.images import read_image
from gfl.inference.visualize import draw_predictions
from gfl.structures import Id, Predictions, coco_records, coco_rows

if TYPE_CHECKING:
    import supervision

Format = Literal["coco", "yolo"]


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first, in the host's memory.

    Attributes:
        source: Path of the image; empty if the image was passed as pixels.
        size: (height, width) of the image, px.
        predictions: Boxes, scores, labels, and the edges' standard deviations and distributions.
        classes: Class names of the model, by label.
        category_ids: Ids of these classes in the annotations of the model's training set.
    """

    source: str
    size: tuple[int, int]
    predictions: Predictions
    classes: Sequence[str]
    category_ids: Sequence[Id]

    def __len__(self) -> int:
        return len(self.predictions)

    @property
    def boxes(self) -> Tensor:
        """Boxes `xyxy` in px of the image, (N, 4)."""
        return self.predictions.boxes

    @property
    def scores(self) -> Tensor:
        """Scores in (0, 1), (N,)."""
        return self.predictions.scores

    @property
    def labels(self) -> Tensor:
        """Classes, (N,), int64."""
        return self.predictions.labels

    @property
    def edge_std(self) -> Tensor:
        """Standard deviation of each edge (left, top, right, bottom) in px, (N, 4)."""
        return self.predictions.edge_std

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.classes[label] for label in self.labels.tolist()]

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return the detections as COCO's result records, each with its `edge_std`."""
        records = coco_records(coco_rows(self.predictions, 0), [image_id], self.category_ids)
        uncertain = self.edge_std.tolist()
        return [r | {"edge_std": std} for r, std in zip(records, uncertain, strict=True)]

    def to_yolo(self) -> str:
        """Return lines in YOLO's format: label, centre x and y, width, height in 0 to 1, score."""
        height, width = self.size
        lines = []
        for label, box, score in zip(
            self.labels.tolist(), self.boxes.tolist(), self.scores.tolist(), strict=True
        ):
            x1, y1, x2, y2 = box
            centre = f"{(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f}"
            lines.append(
                f"{label} {centre} {(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f} {score:.6f}\n"
            )
        return "".join(lines)

    def to_supervision(self) -> "supervision.Detections":
        """Return the detections in the form of the package `supervision`.

        Its `data` holds `class_name` and `edge_std`.

        Raises:
            ValueError: The package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ValueError("to_supervision: needs `pip install supervision`") from error
        import numpy as np

        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names), "edge_std": self.edge_std.numpy()},
        )


def write_detections(
    detections: Sequence[Detections], folder: Path, form: Format, min_score: float
) -> dict[str, int]:
    """Write detections as files and as pictures; return the number of detections of each class.

    `coco` writes `predictions.json`, a dataset whose annotations have a `score` and an `edge_std`.
    `yolo` writes a text file of the same name for each image, and `classes.txt`.

    Args:
        detections: Detections of each image, whose `source` is a file.
        folder: Folder of the results, created if it does not exist.
        form: Format of the files.
        min_score: Smallest score of the detections that are drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (_write_coco if form == "coco" else _write_yolo)(detections, folder)
    for number, of_image in enumerate(detections, start=1):
        picture = folder / f"{number:06d}-{Path(of_image.source).stem}.png"
        pixels = read_image(Path(of_image.source))
        draw_predictions([pixels], [of_image.predictions], of_image.classes, picture, min_score)
    counts = Counter(name for of_image in detections for name in of_image.names)
    return {name: counts[name] for name in detections[0].classes}


def require_own_names(files: Sequence[Path]) -> None:
    """Check that each image gets a YOLO file of its own.

    Raises:
        ValueError: Two images have the same name, apart from folder and suffix.
    """
    stem, count = Counter(file.stem for file in files).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{stem}: {count} images have this name, so that YOLO's files would be one; predict "
            "each into a folder of its own, or choose --format coco"
        )


def _write_coco(detections: Sequence[Detections], folder: Path) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, of_image in enumerate(detections, start=1):
        height, width = of_image.size
        images.append(
            {"id": number, "file_name": of_image.source, "height": height, "width": width}
        )
        for record in of_image.to_coco(number):
            _, _, w, h = record["bbox"]
            extra = {"id": len(annotations) + 1, "area": w * h, "iscrowd": 0}
            annotations.append(record | extra)
    named = zip(detections[0].category_ids, detections[0].classes, strict=True)
    categories = [{"id": identity, "name": name} for identity, name in named]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "predictions.json").write_text(json.dumps(content, indent=1) + "\n")


def _write_yolo(detections: Sequence[Detections], folder: Path) -> None:
    for of_image in detections:
        (folder / f"{Path(of_image.source).stem}.txt").write_text(of_image.to_yolo())
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in detections[0].classes))
