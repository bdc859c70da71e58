"""Whether an exported file does what the detector does: boxes and scores on real images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from gfl.data.loading import SIZE_MULTIPLE
from gfl.data.transforms import as_sample, build_transforms
from gfl.detector import Detector
from gfl.export import INPUT, Exportable, ExportError, Form
from gfl.predict import Model

BOX_PX, SCORE = 0.01, 1e-4
"""The most that boxes and scores may differ in float32."""

Run = Callable[[Tensor], list[NDArray[Any]]]
"""Takes images (B, 3, H, W) and returns the outputs of a file."""


@dataclass(frozen=True)
class Difference:
    """The largest differences from the detector over several images.

    Attributes:
        box_px: Of a coordinate, px of the network's input.
        score: Of a score.
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


def compare(model: Model, run: Run, form: Form, images: Iterable[Tensor]) -> Difference:
    """Return how far a file's outputs are from the detector's on `images`, (1, 3, H, W) each.

    Raises:
        ExportError: they are further apart than rounding explains.
    """
    box, score, count = 0.0, 0.0, 0
    for image in images:
        outputs = run(image)
        expected = _eager(model.detector, image, form)
        if form.with_nms:
            outputs = _in_order_of([output[outputs[1] > 0] for output in outputs], expected)
        shapes = [list(output.shape) for output in outputs]
        if shapes[0] != list(expected[0].shape):
            raise ExportError(
                f"{list(image.shape)}: the file gives {shapes[0][0]} detections, the detector "
                f"{len(expected[0])}"
            )
        box = max(box, _largest(outputs[0], expected[0]))
        score = max(score, _largest(outputs[1], expected[1]))
        if form.with_nms and (outputs[2] != expected[2].numpy()).any():
            raise ExportError(f"{list(image.shape)}: the file gives other classes")
        count += int(np.prod(outputs[0].shape[:-1]))
    if box > BOX_PX or score > SCORE:
        raise ExportError(
            f"boxes differ by up to {box:.3g} px and scores by {score:.3g}; rounding is up to "
            f"{BOX_PX} px and {SCORE}"
        )
    return Difference(box, score, count)


def _in_order_of(outputs: list[NDArray[Any]], expected: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Return a file's detections in the order of the detector's.

    Rounding may swap two of nearly the same score; where they are no pairs, nothing is changed.
    """
    boxes, scores, labels = (each.numpy() for each in expected)
    if len(boxes) != len(outputs[0]):
        return outputs
    far = np.abs(outputs[0][None] - boxes[:, None]).max(axis=-1)
    far[labels[:, None] != outputs[2][None]] = np.inf
    far[np.abs(scores[:, None] - outputs[1][None]) > SCORE] = np.inf
    order = far.argmin(axis=1) if len(boxes) else np.arange(0)
    is_pairing = len(np.unique(order)) == len(order)
    return [output[order] for output in outputs] if is_pairing else outputs


def _eager(detector: Detector, image: Tensor, form: Form) -> Sequence[Tensor]:
    """Return boxes, scores and labels as the detector itself finds them."""
    if form.with_nms:
        height, width = image.shape[-2:]
        sizes = torch.tensor([[height, width]])
        padded = pad(image, (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE))
        (found,) = detector.predict(detector.normalize(padded, sizes), sizes)
        return found.boxes, found.scores, found.labels
    with torch.no_grad():
        return Exportable(detector, form)(image)


def _largest(one: NDArray[Any], other: Tensor) -> float:
    return float(np.abs(one - other.numpy()).max()) if one.size else 0.0
