"""Detections matched with the objects of a split, as COCO matches them at one IoU.

Shapes: N detections that count, A objects that count.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gfl.config.schema import Config
from gfl.data.split import Split
from gfl.evaluation.coco_eval import match_with_hotcoco, numbered_truth
from gfl.structures import Rows

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """Detections and objects that count, each matched with at most one of the others.

    A detection does not count if it lies on an ignored object, or beyond the largest number of
    detections of an image and class. An object does not count if it is ignored.

    Attributes:
        iou: Smallest IoU of a detection and its object.
        detection: Row of every detection, (N,).
        image: Number of every detection's image (`Split.numbers`), (N,).
        label: Class of every detection, (N,).
        score: Score of every detection, (N,).
        box: `xyxy` of every detection in px, (N, 4).
        match: Position of every detection's object among the objects, -1 without one, (N,).
        object_image: Number of every object's image, (A,).
        object_label: Class of every object, (A,).
        object_box: `xyxy` of every object in px, (A, 4).
    """

    iou: float
    detection: Integers
    image: Integers
    label: Integers
    score: Floats
    box: Floats
    match: Integers
    object_image: Integers
    object_label: Integers
    object_box: Floats

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether every detection has an object, (N,)."""
        return self.match >= 0

    @property
    def missed(self) -> Integers:
        """Positions of the objects without a detection."""
        return np.setdiff1d(np.arange(len(self.object_label)), self.match)


def match_detections(split: Split, rows: Rows, config: Config, iou: float = 0.5) -> Matches:
    """Return the matches of all detections in `split`.

    Args:
        split: The images and their objects.
        rows: The detections of all images, (M, 7).
        config: The limits on the detections of an image.
        iou: Smallest IoU of a detection and its object: 0.5, 0.55, ... or 0.95.
    """
    truth = numbered_truth(split)["annotations"]
    numbers = [number for number, entry in enumerate(truth, start=1) if not entry["iscrowd"]]
    position_of = {number: position for position, number in enumerate(numbers)}
    objects = [truth[number - 1] for number in numbers]
    diagnosis = match_with_hotcoco(split, rows, config).image_diagnostics(iou_thr=iou)
    detection = np.array(sorted(diagnosis["dt_status"]), np.int64) - 1  # hotcoco counts from 1
    matched = diagnosis["dt_match"]
    counted = rows[detection]
    return Matches(
        iou=iou,
        detection=detection,
        image=counted[:, 0].astype(np.int64),
        label=counted[:, 6].astype(np.int64),
        score=counted[:, 5],
        box=_xyxy(counted[:, 1:5]),
        match=np.array(
            [position_of[matched[n + 1]] if n + 1 in matched else -1 for n in detection.tolist()],
            np.int64,
        ),
        object_image=np.array([entry["image_id"] for entry in objects], np.int64),
        object_label=np.array([entry["category_id"] for entry in objects], np.int64),
        object_box=_xyxy(np.array([entry["bbox"] for entry in objects], np.float64)),
    )


def _xyxy(xywh: Floats) -> Floats:
    corner, sides = xywh.reshape(-1, 4)[:, :2], xywh.reshape(-1, 4)[:, 2:]
    return np.concatenate([corner, corner + sides], axis=1)
