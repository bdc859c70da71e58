"""Detections: the result for one image, its conversions for other tools, and files of several."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory, TemporaryFile
from textwrap import indent
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
    detections: Iterable[Detections], folder: Path, form: Format, min_score: float
) -> dict[str, int]:
    """Write detections as files and as pictures; return the number of detections of each class.

    `coco` writes `predictions.json`, a dataset whose annotations have a `score` and an `edge_std`.
    `yolo` writes a text file of the same name for each image, and `classes.txt`. The detections of
    one image at a time are in memory, and the files appear in `folder` when all are complete.

    Args:
        detections: Detections of each image, at least one, whose `source` is a file.
        folder: Folder of the results, created if it does not exist.
        form: Format of the files.
        min_score: Smallest score of the detections that are drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with TemporaryDirectory(prefix=".predictions-", dir=folder) as scratch:
        partial = Path(scratch)
        with (_CocoWriter if form == "coco" else _YoloWriter)(partial) as writer:
            for number, of_image in enumerate(detections, start=1):
                writer.add(number, of_image)
                source = Path(of_image.source)
                picture = partial / f"{number:06d}-{source.stem}.png"
                drawn = [of_image.predictions]
                draw_predictions([read_image(source)], drawn, of_image.classes, picture, min_score)
                counts.update(of_image.names)
            writer.finish(of_image)
        for file in sorted(partial.iterdir()):  # numbered pictures come first
            file.replace(folder / file.name)
    return {name: counts[name] for name in of_image.classes}


class _CocoWriter:
    """Writes `predictions.json` image by image; annotations wait in a file of their own."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "predictions.json").open("w")
        self._annotations = TemporaryFile("w+")  # noqa: SIM115
        self._count = 0

    def __enter__(self) -> "_CocoWriter":
        self._file.write('{\n "images": [')
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._annotations.close()

    def add(self, number: int, of_image: Detections) -> None:
        """Write the detections of the image with the id `number`."""
        height, width = of_image.size
        image = {"id": number, "file_name": of_image.source, "height": height, "width": width}
        self._file.write(_listed(image, number))
        for record in of_image.to_coco(number):
            self._count += 1
            _, _, w, h = record["bbox"]
            extra = {"id": self._count, "area": w * h, "iscrowd": 0}
            self._annotations.write(_listed(record | extra, self._count))

    def finish(self, of_image: Detections) -> None:
        """Write the rest of the file; `of_image` knows the classes."""
        self._file.write('\n ],\n "categories": [')
        named = zip(of_image.category_ids, of_image.classes, strict=True)
        for number, (identity, name) in enumerate(named, start=1):
            self._file.write(_listed({"id": identity, "name": name}, number))
        self._file.write('\n ],\n "annotations": [')
        self._annotations.seek(0)
        copyfileobj(self._annotations, self._file)
        self._file.write(("\n ]" if self._count else "]") + "\n}\n")


def _listed(entry: dict[str, Any], number: int) -> str:
    """Return an entry as the element `number`, from 1, of an indented list in JSON."""
    text = json.dumps(entry, indent=1)
    return ("," if number > 1 else "") + "\n" + indent(text, "  ")


class _YoloWriter:
    """Writes a text file for each image, and `classes.txt`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> "_YoloWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, number: int, of_image: Detections) -> None:
        """Write the detections of an image."""
        (self._folder / f"{Path(of_image.source).stem}.txt").write_text(of_image.to_yolo())

    def finish(self, of_image: Detections) -> None:
        """Write the names of the classes; `of_image` knows them."""
        names = "".join(f"{name}\n" for name in of_image.classes)
        (self._folder / "classes.txt").write_text(names)


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
