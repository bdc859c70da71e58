"""Kinds of errors as in TIDE (Bolya et al., ECCV 2020), and the AP that each of them costs.

A wrong detection is compared with the objects of its image that are not ignored. The first kind
whose condition holds is its kind, in the order of the authors' package tidecv:

- `Loc`: with its own class, the largest IoU is at least 0.1 and below 0.5.
- `Cls`: with other classes, the largest IoU is at least 0.5.
- `Dupe`: with a matched object of its own class, the largest IoU is at least 0.5.
- `Bkg`: with all classes, the largest IoU is below 0.1.
- `Both`: anything else, which is a wrong class and a wrong place.

`Miss` is an object without a detection that no corrected `Cls` or `Loc` would find.

Shapes: N detections that count.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_iou

from gfl.analysis.matches import Matches

KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")

MEANING = {
    "Cls": "right place, wrong class",
    "Loc": "right class, wrong place",
    "Both": "wrong class and wrong place",
    "Dupe": "a second detection of an object",
    "Bkg": "no object there",
    "Miss": "an object that nothing detects",
}

BACKGROUND_IOU = 0.1
"""Largest IoU with any object of a detection of the background."""


@dataclass(frozen=True)
class ErrorTypes:
    """The errors of a model at an IoU of 0.5.

    Attributes:
        ap: AP at this IoU.
        gain: AP that correcting all errors of a kind would add, by kind.
        count: Number of errors, by kind.
    """

    ap: float
    gain: dict[str, float]
    count: dict[str, int]


def error_types(evaluator: Any) -> ErrorTypes:
    """Return the errors and their costs from hotcoco's evaluator (`match_with_hotcoco`)."""
    tide = evaluator.tide_errors(pos_thr=0.5, bg_thr=BACKGROUND_IOU)
    return ErrorTypes(
        ap=tide["ap_base"],
        gain={kind: tide["delta_ap"][kind] for kind in KINDS},
        count={kind: tide["counts"][kind] for kind in KINDS},
    )


def kinds_of_errors(matches: Matches) -> npt.NDArray[np.str_]:
    """Return the kind of every detection's error, empty for a correct one, (N,)."""
    kinds = np.full(len(matches.detection), "", dtype="<U4")
    matched = np.zeros(len(matches.object_label), bool)
    matched[matches.match[matches.correct]] = True
    wrong = np.flatnonzero(~matches.correct)
    for image in np.unique(matches.image[wrong]).tolist():
        detections = wrong[matches.image[wrong] == image]
        objects = np.flatnonzero(matches.object_image == image)
        iou = box_iou(
            torch.from_numpy(matches.box[detections]), torch.from_numpy(matches.object_box[objects])
        ).numpy()
        same = matches.label[detections][:, None] == matches.object_label[objects][None]
        own, others = _largest(iou * same), _largest(iou * ~same)
        used = _largest(iou * (same & matched[objects]))
        kinds[detections] = np.select(
            [
                (own >= BACKGROUND_IOU) & (own < matches.iou),
                others >= matches.iou,
                used >= matches.iou,
                np.maximum(own, others) < BACKGROUND_IOU,
            ],
            ["Loc", "Cls", "Dupe", "Bkg"],
            "Both",
        )
    return kinds


def _largest(iou: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the largest IoU of every detection with any object, 0 without objects."""
    return iou.max(axis=1, initial=0.0)
