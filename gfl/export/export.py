"""Exported files: written, compared with the detector before they are published, and quantized."""

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

from gfl.data.augment import as_sample
from gfl.data.dataset import SIZE_MULTIPLE, build_transforms, cut_window
from gfl.data.images import read_image
from gfl.data.split import Split
from gfl.data.tiles import windows
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
from gfl.model.tile_merge import merge_tiles
from gfl.structures import Predictions, Rows, coco_rows

logger = logging.getLogger(__name__)

FileFormat = Literal["onnx", "pt2"]

FILES = ("model.onnx", "model.pt2", "model.int8.onnx", "model.int8.json", "model.json")
"""Names of all files that exports write."""

BOX_PX, SCORE = 0.01, 1e-4
"""Largest differences in float32 of outputs in px, and of outputs in 0 to 1."""

PX_OUTPUTS, UNIT_OUTPUTS = ("boxes", "edge_std"), ("scores", "distributions")
"""Names of the outputs in px, and of the outputs in 0 to 1."""

Outputs = dict[str, NDArray[Any]]
"""Outputs by the names of `Form.outputs`."""

Run = Callable[[Tensor], list[NDArray[Any]]]
"""A function from images (B, 3, H, W) to the outputs of an exported file."""


@dataclass(frozen=True)
class Difference:
    """The largest differences between a file and the detector over several images.

    Attributes:
        box_px: Difference of a coordinate or a standard deviation, in px of the network's input.
        score: Difference of a score or of a bin's probability.
        detections: Number of compared detections.
    """

    box_px: float
    score: float
    detections: int


def export(
    model: Model,
    folder: Path,
    formats: Sequence[FileFormat],
    form: Form,
    images: Sequence[Path],
    protocol: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write `model.onnx` and `model.pt2` into `folder` if their outputs equal the detector's.

    Args:
        model: The model.
        folder: Folder of the files, created if it does not exist. `FILES` of earlier exports are
            replaced or removed.
        formats: Formats to write.
        form: Outputs of the files.
        images: Images on which the files are compared with the detector.
        protocol: Protocol of the model's FPS, which is stored in the files.

    Returns:
        The largest differences and the size in bytes of each file, by file name.

    Raises:
        ExportError: The model cannot be exported, or a file's outputs differ; `folder` does not
            change then.
    """
    program = trace(Exportable(model.detector, form))
    about = metadata(model.config, model.about, form, protocol)
    parity: dict[str, dict[str, Any]] = {}
    with _published(folder, FILES) as scratch:
        for file_format in formats:
            path = scratch / f"model.{file_format}"
            if file_format == "onnx":
                save_onnx(program, path, form, about)
            else:
                save_pt2(program, path, about)
            inputs = (scaled(model, read_image(image)) for image in images)
            difference = compare(model, OPENERS[file_format](path), form, inputs)
            if form.with_nms and not difference.detections:
                logger.warning(
                    "%s: nothing was detected, so it is hardly checked; give other images",
                    path.name,
                )
            parity[path.name] = asdict(difference) | {"bytes": path.stat().st_size}
        (scratch / "model.json").write_text(json.dumps(about | {"parity": parity}, indent=1) + "\n")
    return parity


@contextmanager
def _published(folder: Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a scratch folder whose files move to `folder` after the block, unless it fails.

    Files of `names` that `folder` already has are removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        yield Path(scratch)
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)


def open_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file with onnxruntime on the CPU, in torch's threads.

    Raises:
        ExportError: The package onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "onnxruntime: not installed; pip install 'gfl-platform[export]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images.numpy()})


def open_pt2(path: Path) -> Run:
    """Return a function that runs a .pt2 file on the CPU."""
    # The guards would refuse images whose coarsest level is a single point, but they work.
    module = torch.export.load(path).module(check_guards=False)

    def run(images: Tensor) -> list[NDArray[Any]]:
        with torch.no_grad():
            return [output.numpy() for output in module(images)]

    return run


OPENERS = {"onnx": open_onnx, "pt2": open_pt2}
"""Functions that open a file, by its format."""


def scaled(model: Model, pixels: Tensor) -> Tensor:
    """Return an image (3, H, W) as input of an exported file: (1, 3, H', W') float32."""
    transforms = build_transforms(model.config.data)
    resized, _ = transforms(*as_sample(pixels, torch.zeros(0, 4)))
    return resized.as_subclass(Tensor).float().unsqueeze(0)


def padded(image: Tensor) -> Tensor:
    """Return `scaled` images (B, 3, H, W) padded for the detector: H and W are multiples of 32."""
    height, width = image.shape[-2:]
    return pad(image, (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE))


def compare(model: Model, run: Run, form: Form, images: Iterable[Tensor]) -> Difference:
    """Return the differences between a file's outputs and the detector's.

    Args:
        model: The detector.
        run: Runs the file.
        form: Outputs of the file.
        images: Inputs, (1, 3, H, W) each.

    Raises:
        ExportError: The outputs differ by more than rounding.
    """
    detector = copy.deepcopy(model.detector).cpu()  # files run on the CPU, too
    box, score, count = 0.0, 0.0, 0
    for image in images:
        outputs = dict(zip(form.outputs, run(image), strict=True))
        expected = _eager(detector, image, form)
        if form.with_nms:
            filled = outputs["scores"] > 0
            outputs = _in_order_of(
                {name: output[filled] for name, output in outputs.items()}, expected
            )
        if outputs["boxes"].shape != expected["boxes"].shape:
            raise ExportError(
                f"image {list(image.shape)}: the file gives {len(outputs['boxes'])} detections, "
                f"the detector {len(expected['boxes'])}"
            )
        if form.with_nms and (outputs["labels"] != expected["labels"]).any():
            raise ExportError(
                f"image {list(image.shape)}: the file gives other classes than the detector"
            )
        distances = {
            name: float(np.abs(outputs[name] - expected[name]).max(initial=0))
            for name in form.outputs
        }
        box = max(box, *(distances[name] for name in PX_OUTPUTS if name in distances))
        score = max(score, *(distances[name] for name in UNIT_OUTPUTS if name in distances))
        count += int(np.prod(outputs["boxes"].shape[:-1]))
    if box > BOX_PX or score > SCORE:
        raise ExportError(
            f"boxes differ by up to {box:.3g} px and scores by {score:.3g}; rounding is up to "
            f"{BOX_PX} px and {SCORE}"
        )
    return Difference(box, score, count)


def _in_order_of(outputs: Outputs, expected: Outputs) -> Outputs:
    """Return a file's detections in the order of the detector's.

    Rounding may swap two detections of nearly the same score. Where the detections do not pair up,
    their order stays.
    """
    if len(outputs["boxes"]) != len(expected["boxes"]) or not len(outputs["boxes"]):
        return outputs
    distances = np.abs(outputs["boxes"] - expected["boxes"][:, None]).max(axis=-1)
    distances[expected["labels"][:, None] != outputs["labels"]] = np.inf
    distances[np.abs(expected["scores"][:, None] - outputs["scores"]) > SCORE] = np.inf
    order = distances.argmin(axis=1)
    is_pairing = len(np.unique(order)) == len(order)
    return {name: output[order] for name, output in outputs.items()} if is_pairing else outputs


def _eager(detector: Detector, image: Tensor, form: Form) -> Outputs:
    """Return the outputs of `form`, computed by the detector itself."""
    height, width = image.shape[-2:]
    sizes = torch.tensor([[height, width]])
    inputs = detector.normalize(padded(image), sizes)
    if form.with_nms:
        (predictions,) = detector.predict(inputs, sizes)
        return {name: getattr(predictions, name).numpy() for name in form.outputs}
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


def quantize(
    model: Model,
    folder: Path,
    calibration: Sequence[Path],
    split: Split,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Write `model.int8.onnx` beside `model.onnx`, and return the AP of both on `split`.

    Convolutions become int8 after training, their weights per channel (static quantization, QDQ),
    with the ranges of the calibration images. The AP is written to `model.int8.json`.

    Args:
        model: The model.
        folder: Folder with `model.onnx`.
        calibration: Images that define the ranges of activations.
        split: Set on which the AP is measured.
        progress: Called after every image with the number of images done, and of all images.

    Raises:
        ExportError: There is no `model.onnx` with NMS.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    source = folder / "model.onnx"
    if not source.exists():
        raise ExportError(
            f"{source}: no such file; int8 needs the ONNX file with NMS, so export that first"
        )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            pixels = (tile for path in calibration for tile in _tiles(model, path)[1])
            self._inputs = ({INPUT: scaled(model, tile).numpy()} for tile in pixels)

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
            for rows_of_image in _rows(model, open_onnx(file), split):
                rows.append(rows_of_image)
                progress(before + len(rows) - 1, 2 * count)
            figures[f"{name} seconds"] = time.perf_counter() - started
            evaluation = evaluate_split(split, np.concatenate(rows), model.config)
            figures[f"{name} AP"] = evaluation.metrics["AP"]
        figures["bytes"] = float(path.stat().st_size)
        (scratch / "model.int8.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _rows(model: Model, run: Run, split: Split) -> Iterator[Rows]:
    """Yield the detections of a file with NMS in every image of `split`."""
    for number, record in zip(split.numbers, split.records, strict=True):
        places, tiles = _tiles(model, record.path)
        found = [_detections(model, run, pixels) for pixels in tiles]
        settings = model.config.postprocess
        yield coco_rows(merge_tiles(found, places, record.size, settings), number)


def _tiles(model: Model, path: Path) -> tuple[Tensor, list[Tensor]]:
    """Return the windows of an image (W, 4) and their pixels, a single one without `data.tiles`."""
    pixels = read_image(path)
    height, width = pixels.shape[1:]
    places = windows(height, width, model.config.data.tiles)
    return torch.from_numpy(places), [cut_window(pixels, place) for place in places.tolist()]


def _detections(model: Model, run: Run, pixels: Tensor) -> Predictions:
    """Return the detections of a file with NMS in an image (3, H, W)."""
    image = scaled(model, pixels)
    boxes, scores, labels, edge_std = (torch.from_numpy(o) for o in run(image)[:4])
    rescale = Tensor([pixels.shape[2] / image.shape[3], pixels.shape[1] / image.shape[2]])
    filled = scores > 0
    return Predictions(
        boxes=(boxes * rescale.repeat(2))[filled],
        scores=scores[filled],
        labels=labels[filled],
        edge_std=(edge_std * rescale.repeat(2))[filled],
        distributions=torch.empty(int(filled.sum()), 4, 0),
    )
