"""Times COCO AP of 5000 images and 500 000 detections: ours, hotcoco from files, pycocotools.

Reading the ground truths is included; a set as large as val2017 is made up. The twelve statistics
must be equal. pycocotools takes about a minute, so it runs once.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np

from gfl.evaluation.coco_eval import evaluate_detections
from gfl.structures import Rows, coco_records

REPEATS = 7
IMAGES, OBJECTS, DETECTIONS, CLASSES = 5000, 36_000, 500_000, 80


def compare(*, official: bool) -> dict[str, dict[str, float]]:
    """Return the median seconds of each, and how far its statistics are from the referee's.

    Args:
        official: Whether pycocotools is the referee, which takes about a minute; else hotcoco is.
    """
    truth, rows = make_case(np.random.default_rng(0))
    ids = [image["id"] for image in truth["images"]]
    with tempfile.TemporaryDirectory() as folder:
        annotations, results = Path(folder) / "truth.json", Path(folder) / "results.json"
        annotations.write_text(json.dumps(truth))
        results.write_text(json.dumps(coco_records(rows)))
        runs: dict[str, tuple[int, Callable[[], list[float]]]] = {
            "GFL": (REPEATS, lambda: measure(annotations, rows, ids)),
            "hotcoco, detections in a file": (REPEATS, lambda: plain(annotations, results)),
        }
        if official:
            runs["pycocotools"] = 1, lambda: measure(annotations, rows, ids, official=True)
        measured = {name: median(*run) for name, run in runs.items()}
    *_, (_, expected) = measured.values()
    return {
        name: {
            "median_s": seconds,
            "difference": float(np.abs(np.subtract(found, expected)).max()),
        }
        for name, (seconds, found) in measured.items()
    }


def make_case(random: np.random.Generator) -> tuple[dict[str, Any], Rows]:
    """Return a COCO dataset, and detections: some near its objects, the others anywhere."""
    image = np.sort(random.integers(IMAGES, size=OBJECTS))
    kind = random.integers(CLASSES, size=OBJECTS)
    boxes = make_boxes(random, OBJECTS)
    crowd = (random.random(OBJECTS) < 0.012).astype(int)
    near = random.integers(OBJECTS, size=DETECTIONS // 2)  # of which object, each
    error = random.exponential(0.15, size=(len(near), 1))
    jitter = random.normal(size=(len(near), 4)) * error * boxes[near][:, [2, 3, 2, 3]]
    found = np.concatenate([np.abs(boxes[near] + jitter), make_boxes(random, DETECTIONS // 2)])
    scores = np.concatenate([np.exp(-4 * error[:, 0]), random.beta(1, 8, size=DETECTIONS // 2)])
    images = np.concatenate([image[near], random.integers(IMAGES, size=DETECTIONS // 2)])
    kinds = np.concatenate([kind[near], random.integers(CLASSES, size=DETECTIONS // 2)])
    fields = zip(image.tolist(), kind.tolist(), boxes.tolist(), crowd.tolist(), strict=True)
    truth = {
        "images": [{"id": n} for n in range(IMAGES)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(CLASSES)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": b, "area": b[2] * b[3], "iscrowd": c}
            for n, (i, k, b, c) in enumerate(fields, start=1)
        ],
    }
    rows = np.column_stack([images, found, scores.round(3), kinds])  # rounded: with ties
    return truth, rows[np.argsort(images, kind="stable")]


def make_boxes(random: np.random.Generator, count: int) -> Rows:
    """Return boxes `xywh` in px, (count, 4), of all sizes alike."""
    sides = np.exp(random.uniform(np.log(8), np.log(400), size=(count, 2)))
    return np.column_stack([random.uniform(0, 240, size=(count, 2)), sides])


def measure(
    annotations: Path, rows: Rows, ids: list[int], *, official: bool = False
) -> list[float]:
    """Return the twelve statistics through `gfl.evaluation.coco_eval`."""
    return list(evaluate_detections(annotations, rows, ids, official=official).metrics.values())


def plain(annotations: Path, results: Path) -> list[float]:
    """Return them through hotcoco alone."""
    truth = hotcoco.COCO(str(annotations))
    evaluation = hotcoco.COCOeval(truth, truth.load_res(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()
    return list(evaluation.stats)


def median(repeats: int, run: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Return the median seconds of `repeats` runs, and what they return."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found
