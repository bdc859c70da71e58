"""What a model found in one image, and how other tools want it told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gfl.model.postprocess import Predictions, coco_rows
from gfl.rows import coco_records

if TYPE_CHECKING:
    import supervision


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
