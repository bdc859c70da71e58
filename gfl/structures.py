"""Data that several rooms share: padded ground truths, detections of an image, COCO rows.

Shapes: B images, G padded ground truths of an image, N detections, R bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Predictions:
    """The detections of one image, best first.

    Attributes:
        boxes: `xyxy` in px of the original image, (N, 4).
        scores: Scores in (0, 1), (N,).
        labels: Classes, (N,), int64.
        edge_std: Standard deviation in px of the learned distribution of each edge (left, top,
            right, bottom), (N, 4). It tells how uncertain the edge's position is, and is 0 for a
            model without distributions (`model.edges: dirac`).
        distributions: The learned edge distributions, (N, 4, R).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    edge_std: Tensor
    distributions: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def cpu(self) -> "Predictions":
        """Return these detections in the host's memory."""
        return Predictions(*(getattr(self, field.name).cpu() for field in fields(self)))

    def select(self, keep: Tensor) -> "Predictions":
        """Return the detections at the indices, or under the mask, `keep`."""
        return Predictions(*(getattr(self, field.name)[keep] for field in fields(self)))


def concatenated(parts: Sequence[Predictions]) -> Predictions:
    """Return the detections of several `parts`, at least one, one part after the other."""
    names = [field.name for field in fields(Predictions)]
    return Predictions(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Targets:
    """Ground truths of a batch, padded to equal counts.

    Attributes:
        boxes: `xyxy` in px of the network's input, (B, G, 4).
        labels: Classes, (B, G), int64.
        mask: Which entries are objects and not padding, (B, G).
        sizes: (height, width) in px of every image without its padding, (B, 2).
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    sizes: Tensor


def pad_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor], sizes: Tensor) -> Targets:
    """Return ground truths padded to the largest count, and to at least one.

    Args:
        boxes: Per image (G_i, 4).
        labels: Per image (G_i,).
        sizes: (height, width) of every image, (B, 2).

    Raises:
        ValueError: counts or shapes do not fit together.
    """
    if not len(boxes) == len(labels) == len(sizes):
        raise ValueError(
            f"expected boxes and labels of each of {len(sizes)} images, got {len(boxes)} and "
            f"{len(labels)}"
        )
    for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if box.shape != (len(label), 4):
            raise ValueError(
                f"image {index}: expected boxes (G, 4) and labels (G,), got {tuple(box.shape)} and "
                f"{tuple(label.shape)}; without objects (0, 4) and (0,)"
            )
    present = [torch.ones_like(classes, dtype=torch.bool) for classes in labels]
    return Targets(_pad(boxes).float(), _pad(labels), _pad(present), sizes)


def _pad(values: Sequence[Tensor]) -> Tensor:
    """Return `values` (G_i, ...) stacked and filled up with zeros, (B, max(1, G_i), ...)."""
    one = values[0].new_zeros(1, *values[0].shape[1:])
    return pad_sequence([*values, one], batch_first=True)[:-1]


Rows = npt.NDArray[np.float64]
"""Detections in pycocotools' columns, (N, 7): image, x, y, width, height, score, label.

Images have numbers (`gfl.data.split.Split.numbers`), because an id may be a text, or an integer
that no float64 holds.
"""

Id = int | str
"""Id of an image or a category in an annotation file."""


def coco_records(
    rows: Rows, image_ids: Sequence[Id], category_ids: Sequence[Id]
) -> list[dict[str, Any]]:
    """Return detections as records of COCO's results format, in full precision.

    Args:
        rows: The detections, (N, 7).
        image_ids: The id of every image, by its number.
        category_ids: The id of every category, by its label.
    """
    return [
        {
            "image_id": image_ids[int(image)],
            "category_id": category_ids[int(label)],
            "bbox": box,
            "score": score,
        }
        for image, *box, score, label in rows.tolist()
    ]


def coco_rows(predictions: Predictions, image: int) -> Rows:
    """Return the detections of the image with the number `image` as `Rows`."""
    labels = predictions.labels
    corner, far = predictions.boxes.split(2, dim=1)
    columns = [
        torch.full_like(labels, image).unsqueeze(1),
        corner,
        far - corner,
        predictions.scores.unsqueeze(1),
        labels.unsqueeze(1),
    ]
    return torch.cat([column.double() for column in columns], dim=1).cpu().numpy()
