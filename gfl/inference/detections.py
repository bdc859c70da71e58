"""What a model found in one image, and how other tools want it told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gfl.structures import Predictions, coco_records, coco_rows

if TYPE_CHECKING:
    import supervision
import json
from collections import Counter
from pathlib import Path
from typing import Literal

from gfl.data.images import read_image
from gfl.inference.visualize import draw_predictions


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first, in the host's memory.

    Attributes:
        source: The image's path; empty if it was given as pixels.
        size: (height, width) of the image, px.
        predictions: Boxes, scores, labels, the uncertainty of edges and their distributions.
        classes: The model's class names, by label.
        category_ids: Its classes' ids in the annotations it was trained on.
    """

    source: str
    size: tuple[int, int]
    predictions: Predictions
    classes: Sequence[str]
    category_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.predictions)

    @property
    def boxes(self) -> Tensor:
        """`xyxy` in px of the image, (N, 4)."""
        return self.predictions.boxes

    @property
    def scores(self) -> Tensor:
        """In (0, 1), (N,)."""
        return self.predictions.scores

    @property
    def labels(self) -> Tensor:
        """Classes, (N,), int64."""
        return self.predictions.labels

    @property
    def edge_std(self) -> Tensor:
        """How unsure the model is of each edge (left, top, right, bottom), px, (N, 4)."""
        return self.predictions.edge_std

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.classes[label] for label in self.labels.tolist()]

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return COCO's result records, each with its `edge_std`."""
        records = coco_records(coco_rows(self.predictions, image_id, self.category_ids))
        uncertain = self.edge_std.tolist()
        return [r | {"edge_std": std} for r, std in zip(records, uncertain, strict=True)]

    def to_yolo(self) -> str:
        """Return YOLO's lines: label, centre x and y, width, height in 0 to 1, and the score."""
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
        """Return them as the package `supervision` has them, with `class_name` and `edge_std`.

        Raises:
            ValueError: that package is not installed.
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
