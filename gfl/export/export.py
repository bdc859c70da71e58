"""Exports that are checked before anybody sees them: files, their parity, their AP in int8."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gfl.data.images import read_image
from gfl.data.split import Split
from gfl.evaluation.coco_eval import evaluate_split
from gfl.export.exportable import (
    INPUT,
    Exportable,
    ExportError,
    Form,
    metadata,
    save_onnx,
    save_pt2,
    trace,
)
from gfl.inference.predictor import Model
from gfl.model.postprocess import Predictions, coco_rows
from gfl.parity import Run, compare, open_onnx, open_pt2, scaled
from gfl.rows import Rows

FileFormat = Literal["onnx", "pt2"]
OPENERS = {"onnx": open_onnx, "pt2": open_pt2}

FILES = ("model.onnx", "model.pt2", "model.int8.onnx", "model.int8.json", "model.json")
"""What exports write."""

logger = logging.getLogger(__name__)


def export(
    model: Model,
    folder: Path,
    formats: Sequence[FileFormat],
    form: Form,
    images: Sequence[Path],
    protocol: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write `model.onnx` and `model.pt2` into `folder`, once they do what the detector does.

    Args:
        model: The model.
        folder: Made if it does not exist; `FILES` of earlier exports are replaced or removed.
        formats: Which files.
        form: Their outputs.
        images: What parity is checked on.
        protocol: How the model's FPS was measured; goes into the files.

    Returns:
        By file name the largest differences and the size in bytes.

    Raises:
        ExportError: a model that cannot be exported, or a file that does something else; `folder`
            is as before then.
    """
    program = trace(Exportable(model.detector, form))
    about = metadata(model.config, model.about, form, protocol)
    found: dict[str, dict[str, Any]] = {}
    with _published(folder, FILES) as scratch:
        for each in formats:
            path = scratch / f"model.{each}"
            if each == "onnx":
                save_onnx(program, path, form, about)
            else:
                save_pt2(program, path, about)
            inputs = (scaled(model, read_image(image)) for image in images)
            difference = compare(model, OPENERS[each](path), form, inputs)
            if form.with_nms and not difference.detections:
                logger.warning(
                    "%s: nothing was detected, so it is hardly checked; give other images",
                    path.name,
                )
            found[path.name] = asdict(difference) | {"bytes": path.stat().st_size}
        (scratch / "model.json").write_text(json.dumps(about | {"parity": found}, indent=1) + "\n")
    return found


def quantize(
    model: Model,
    folder: Path,
    calibration: Sequence[Path],
    split: Split,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Write `model.int8.onnx` beside `model.onnx`, and return the AP of both on `split`.

    Convolutions become int8, weights per channel, after training (static, QDQ): ranges are those of
    the calibration images. The AP goes into `model.int8.json`. `progress` is told how many images
    the files have seen, and how many they will have.

    Raises:
        ExportError: there is no `model.onnx` with NMS.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    source = folder / "model.onnx"
    if not source.exists():
        raise ExportError(f"{source}: not there; int8 is made from the ONNX file with NMS")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._inputs = ({INPUT: scaled(model, read_image(p)).numpy()} for p in calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._inputs, None)

    with _published(folder) as scratch:
        path = scratch / "model.int8.onnx"
        quantize_static(
            source,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
        )
        figures, count = {}, len(split.records)
        for before, name, file in ((0, "float32", source), (count, "int8", path)):
            started = time.perf_counter()
            rows = [np.empty((0, 7))]
            for found in _rows(model, open_onnx(file), split):
                rows.append(found)
                progress(before + len(rows) - 1, 2 * count)
            figures[f"{name} seconds"] = time.perf_counter() - started
            measured = evaluate_split(split, np.concatenate(rows), model.config)
            figures[f"{name} AP"] = measured.metrics["AP"]
        figures["bytes"] = float(path.stat().st_size)
        (scratch / "model.int8.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _rows(model: Model, run: Run, split: Split) -> Iterator[Rows]:
    """Give the detections of a file with NMS in every image of `split`."""
    for record in split.records:
        pixels = read_image(record.path)
        image = scaled(model, pixels)
        boxes, scores, labels, edge_std = (torch.from_numpy(o) for o in run(image)[:4])
        back = Tensor([pixels.shape[2] / image.shape[3], pixels.shape[1] / image.shape[2]])
        there = scores > 0
        found = Predictions(
            boxes=(boxes * back.repeat(2))[there],
            scores=scores[there],
            labels=labels[there],
            edge_std=edge_std[there],
            distributions=torch.empty(int(there.sum()), 4, 0),
        )
        yield coco_rows(found, record.image_id, split.category_ids)


@contextmanager
def _published(folder: Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """Give a folder whose files move to `folder` if all goes well; old ones of `names` go."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        yield Path(scratch)
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)
