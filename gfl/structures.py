"""Detections in COCO's forms."""

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]
"""Detections in pycocotools' columns, (N, 7): image_id, x, y, width, height, score, category_id."""


def coco_records(rows: Rows) -> list[dict[str, Any]]:
    """Return detections as COCO's results format has them, in full precision."""
    return [
        {"image_id": int(image), "category_id": int(category), "bbox": box, "score": score}
        for image, *box, score, category in rows.tolist()
    ]
