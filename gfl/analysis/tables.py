"""The tables of an analysis, as CSV and JSON."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd

from gfl.analysis.analysis import Analysis
from gfl.data.split import Split


def tables(analysis: Analysis, split: Split) -> dict[str, str]:
    """Return the tables by file name.

    - `thresholds.json`: score, precision, recall and F1 of each class where its F1 is best.
    - `edge_intervals.json`: number of sigmas on either side of an edge, by probability.
    - `images.csv`: objects, detections that count, and F1 of each image, the lowest F1 first.
    - `errors.csv`: kind, image, class, score and box (`xyxy`, px) of each wrong detection and each
      missed object, the surest detections first.
    """
    points = {name: asdict(point) if point else None for name, point in analysis.best_f1.items()}
    intervals = {f"{level:.2f}": width for level, width in analysis.intervals.quantiles.items()}
    finite = {level: width for level, width in intervals.items() if np.isfinite(width)}
    return {
        "thresholds.json": json.dumps(points, indent=1, ensure_ascii=False) + "\n",
        "edge_intervals.json": json.dumps(
            {"edges": analysis.intervals.edges, "sigmas": finite}, indent=1
        )
        + "\n",
        "images.csv": _images(analysis, split).to_csv(index=False),
        "errors.csv": _errors(analysis, split).to_csv(index=False),
    }


def _images(analysis: Analysis, split: Split) -> pd.DataFrame:
    count = len(split.records)
    places = {number: place for place, number in enumerate(split.numbers)}
    detections = np.bincount([places[n] for n in analysis.matches.image.tolist()], minlength=count)
    objects = np.bincount(
        [places[n] for n in analysis.matches.object_image.tolist()], minlength=count
    )
    table = pd.DataFrame(
        {
            "image_id": split.image_ids,
            "file": [record.path.name for record in split.records],
            "objects": objects,
            "detections": detections,
            "f1": analysis.image_f1,
        }
    )
    return table.iloc[analysis.worst_images]


def _errors(analysis: Analysis, split: Split) -> pd.DataFrame:
    matches, wrong, missed = analysis.matches, analysis.kinds != "", analysis.matches.missed
    order = np.argsort(-matches.score[wrong], kind="stable")
    boxes = np.concatenate([matches.box[wrong][order], matches.object_box[missed]])
    numbers = np.concatenate([matches.image[wrong][order], matches.object_image[missed]])
    labels = np.concatenate([matches.label[wrong][order], matches.object_label[missed]])
    id_of = dict(zip(split.numbers, split.image_ids, strict=True))
    return pd.DataFrame(
        {
            "kind": np.concatenate([analysis.kinds[wrong][order], np.full(len(missed), "Miss")]),
            "image_id": [id_of[number] for number in numbers.tolist()],
            "class": [split.classes[label] for label in labels.tolist()],
            "score": np.concatenate([matches.score[wrong][order], np.full(len(missed), np.nan)]),
            **{edge: boxes[:, n] for n, edge in enumerate(("left", "top", "right", "bottom"))},
        }
    )
