"""Exports that are checked before anybody sees them: files, their parity, their AP in int8."""

import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import clip_boxes_to_image

from gfl.data.dataset import SIZE_MULTIPLE, as_sample, build_transforms
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
from gfl.model.boxes import flatten_levels, level_points
from gfl.model.detector import Detector
from gfl.model.postprocess import decode
from gfl.structures import Predictions, Rows, coco_rows

BOX_PX, SCORE = 0.01, 1e-4
"""The most that outputs in px, and in 0 to 1, may differ in float32."""

IN_PX, IN_SHARES = ("boxes", "edge_std"), ("scores", "distributions")

Outputs = dict[str, NDArray[Any]]
"""By the names of `Form.outputs`."""

Run = Callable[[Tensor], list[NDArray[Any]]]
"""Takes images (B, 3, H, W) and returns the outputs of a file."""


@dataclass(frozen=True)
class Difference:
    """The largest differences from the detector over several images.

    Attributes:
        box_px: Of a coordinate or of an edge's deviation, px of the network's input.
        score: Of a score or of a bin's share.
        detections: How many were compared.
    """

    box_px: float
    score: float
    detections: int


def open_onnx(path: Path, threads: int | None = None) -> Run:
    """Return what runs an ONNX file by onnxruntime on the CPU.

    Raises:
        ExportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "onnxruntime: not installed; pip install 'gfl-platform[export]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images.numpy()})


def open_pt2(path: Path) -> Run:
    """Return what runs a .pt2 file on the CPU."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> list[NDArray[Any]]:
        with torch.no_grad():
            return [output.numpy() for output in module(images)]

    return run


def scaled(model: Model, pixels: Tensor) -> Tensor:
    """Return an image (3, H, W) as an exported file takes it: (1, 3, H', W') float32."""
    transforms = build_transforms(model.config.data, training=False)
    resized, _ = transforms(*as_sample(pixels, torch.zeros(0, 4)))
    return resized.as_subclass(Tensor).float().unsqueeze(0)


def padded(image: Tensor) -> Tensor:
    """Return `scaled` images (B, 3, H, W) as the detector takes them, H and W multiples of 32."""
    height, width = image.shape[-2:]
    return pad(image, (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE))


def compare(model: Model, run: Run, form: Form, images: Iterable[Tensor]) -> Difference:
    """Return how far a file's outputs are from the detector's on `images`, (1, 3, H, W) each.

    Raises:
        ExportError: they are further apart than rounding explains.
    """
    detector = copy.deepcopy(model.detector).cpu()  # where files are run
    box, score, count = 0.0, 0.0, 0
    for image in images:
        found = dict(zip(form.outputs, run(image), strict=True))
        expected = _eager(detector, image, form)
        if form.with_nms:
            there = found["scores"] > 0
            found = _in_order_of({name: out[there] for name, out in found.items()}, expected)
        if found["boxes"].shape != expected["boxes"].shape:
            raise ExportError(
                f"{list(image.shape)}: the file gives {len(found['boxes'])} detections, the "
                f"detector {len(expected['boxes'])}"
            )
        if form.with_nms and (found["labels"] != expected["labels"]).any():
            raise ExportError(f"{list(image.shape)}: the file gives other classes")
        far = {name: float(np.abs(found[name] - expected[name]).max(initial=0))
               for name in form.outputs}  # fmt: skip
        box = max(box, *(far[name] for name in IN_PX if name in far))
        score = max(score, *(far[name] for name in IN_SHARES if name in far))
        count += int(np.prod(found["boxes"].shape[:-1]))
    if box > BOX_PX or score > SCORE:
        raise ExportError(
            f"boxes differ by up to {box:.3g} px and scores by {score:.3g}; rounding is up to "
            f"{BOX_PX} px and {SCORE}"
        )
    return Difference(box, score, count)


def _in_order_of(found: Outputs, expected: Outputs) -> Outputs:
    """Return a file's detections in the order of the detector's.

    Rounding may swap two of nearly the same score; where they are no pairs, nothing is changed.
    """
    if len(found["boxes"]) != len(expected["boxes"]) or not len(found["boxes"]):
        return found
    far = np.abs(found["boxes"] - expected["boxes"][:, None]).max(axis=-1)
    far[expected["labels"][:, None] != found["labels"]] = np.inf
    far[np.abs(expected["scores"][:, None] - found["scores"]) > SCORE] = np.inf
    order = far.argmin(axis=1)
    is_pairing = len(np.unique(order)) == len(order)
    return {name: output[order] for name, output in found.items()} if is_pairing else found


def _eager(detector: Detector, image: Tensor, form: Form) -> Outputs:
    """Return the outputs of `form` as the detector itself finds them."""
    height, width = image.shape[-2:]
    sizes = torch.tensor([[height, width]])
    inputs = detector.normalize(padded(image), sizes)
    if form.with_nms:
        (found,) = detector.predict(inputs, sizes)
        return {name: getattr(found, name).numpy() for name in form.outputs}
    with torch.no_grad():
        cls_levels, reg_levels = detector(inputs)
    points = level_points(cls_levels)
    boxes, _, distributions = decode(
        flatten_levels(reg_levels), points.xy, points.stride, detector.integral
    )  # (B, P, 4), _, (B, P, 4, R)
    outputs = {
        "boxes": clip_boxes_to_image(boxes, (height, width)),
        "scores": flatten_levels(cls_levels).sigmoid(),  # (B, P, C)
        "distributions": distributions,
    }
    return {name: outputs[name].numpy() for name in form.outputs}


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
