"""Whether an exported file does what the detector does: all its outputs on real images."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from gfl.data.dataset import SIZE_MULTIPLE
from gfl.data.transforms import as_sample, build_transforms
from gfl.export.exportable import INPUT, ExportError, Form
from gfl.inference.predictor import Model
from gfl.model.boxes import ltrb_to_xyxy
from gfl.model.detector import Detector
from gfl.points import grid_points

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
        cells = tuple((level.shape[2], level.shape[3]) for level in cls_levels)
        points = grid_points(cells, image.device)
        cls_logits, reg_logits = (
            torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
            for levels in (cls_levels, reg_levels)
        )  # (B, P, C), (B, P, 4 * R)
        ltrb, _, distributions = detector.integral.describe(reg_logits)
        boxes = ltrb_to_xyxy(points.xy, ltrb * points.stride).clamp(min=0)
        boxes = boxes.minimum(torch.tensor([width, height, width, height]))
    outputs = {"boxes": boxes, "scores": cls_logits.sigmoid(), "distributions": distributions}
    return {name: outputs[name].numpy() for name in form.outputs}
