"""Splits that are made from annotations alone, for tests of evaluation and analysis."""

from pathlib import Path

import numpy as np

from gfl.data.coco import annotations_of
from gfl.data.split import ImageRecord, Split


def split_of(annotations, images, folder=Path(), classes=("a", "b")):
    """Return a split of two classes with the ids 3 and 7 from (image, class, box, iscrowd).

    The images are 1.jpg, 2.jpg ... in `folder`, which need not exist.
    """
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(1, images + 1)],
        "categories": [{"id": 3, "name": classes[0]}, {"id": 7, "name": classes[1]}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": list(box), "iscrowd": crowd,
             "area": box[2] * box[3]}
            for n, (i, c, box, crowd) in enumerate(annotations, start=1)
        ],
    }  # fmt: skip
    records = [
        ImageRecord(
            n, folder / f"{n}.jpg", (99, 99), np.empty((0, 4), np.float32), np.empty(0, np.int64)
        )
        for n in range(1, images + 1)
    ]
    truth = annotations_of(content, Path("none"), "")
    return Split(records=records, classes=[*classes], category_ids=[3, 7], truth=truth,
                 annotations=Path("none"), digest="", dropped={})  # fmt: skip
