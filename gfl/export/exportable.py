"""A detector as a file that runs without this package: `torch.export` (.pt2) and ONNX.

The graph takes RGB pixels in 0..255, (B, 3, H, W) for any H and W, scaled to `data.short_side` and
`data.long_side` but not padded. It normalises, pads, runs the network and decodes. `LAYOUT` lists
the outputs, whose boxes are in px of that input; `docs/prediction.md` has the same as a table.

Shapes: P locations, C classes, R bins, N = `postprocess.detections_per_image`.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.nn.functional import pad
from torchvision.ops import clip_boxes_to_image, nms

from gfl.checkpoint.files import About
from gfl.config.loader import config_hash
from gfl.config.schema import Config
from gfl.data.dataset import SIZE_MULTIPLE
from gfl.model.boxes import STRIDES, flatten_levels, level_points
from gfl.model.detector import Detector
from gfl.model.postprocess import decode

OPSET = 20
"""Version of ONNX's operators."""

METADATA = "gfl.json"
"""Name of the metadata among a .pt2 file's extra files; in ONNX each entry is a JSON property."""

INPUT = "images"
"""Name of the input."""

TRACED = (1, 3, 192, 256)
"""Shape of the traced input, whose height and width stay free in the graph."""

LAYOUT = {
    False: {
        "boxes": "(B, P, 4) float32: xyxy of every location, px of the input",
        "scores": "(B, P, C) float32: of every class, 0 to 1",
        "distributions": "(B, P, 4, R) float32, optional: of the edges l, t, r, b",
    },
    True: {
        "boxes": "(N, 4) float32: xyxy, px of the input, best first",
        "scores": "(N,) float32: 0 to 1; rows with 0 are empty",
        "labels": "(N,) int64: the class",
        "edge_std": "(N, 4) float32: standard deviation of each edge, px of the input",
        "distributions": "(N, 4, R) float32, optional: of the edges l, t, r, b",
    },
}
"""Outputs without NMS in the graph (False) and with it (True, where B is 1)."""


class ExportError(ValueError):
    """A model that cannot be exported, or a file whose outputs differ from the model's."""


@dataclass(frozen=True)
class Form:
    """The form of an exported graph.

    Attributes:
        with_nms: Whether the graph selects detections by NMS.
        distributions: Whether the learned distributions are an output.
    """

    with_nms: bool = True
    distributions: bool = False

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        names = list(LAYOUT[self.with_nms])
        return names if self.distributions else names[:-1]


class Exportable(nn.Module):
    """A detector as a module from pixels to detections, all of them tensors."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, detector: Detector, form: Form) -> None:
        super().__init__()
        model = detector.config.model
        if model.quality != "joint":
            raise ExportError(f"model.quality is {model.quality!r}: only 'joint' can be exported")
        if form.distributions and model.edges != "distribution":
            raise ExportError(
                f"--distributions: model.edges is {model.edges!r}, which learns no distributions; "
                "leave the option out"
            )
        self.detector = (
            copy.deepcopy(detector).eval().cpu().to(memory_format=torch.contiguous_format)
        )
        self.form = form

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs that `LAYOUT` lists for `images` (B, 3, H, W), RGB in 0..255."""
        height, width = images.shape[-2:]
        inputs = (images.float() - self.detector.pixel_mean) / self.detector.pixel_std
        inputs = pad(inputs, (0, _padded(width) - width, 0, _padded(height) - height))
        cls_levels, reg_levels = self.detector(inputs)
        points = level_points(cls_levels)
        reg_logits = flatten_levels(reg_levels)
        integral = self.detector.integral
        if not self.form.with_nms:
            boxes, _, distributions = decode(reg_logits, points.xy, points.stride, integral)
            boxes = clip_boxes_to_image(boxes, (height, width))
            scores = flatten_levels(cls_levels).sigmoid()
            return (boxes, scores, distributions)[: len(self.form.outputs)]
        scores, labels, location = self._candidates(cls_levels)
        boxes, edge_std, distributions = decode(
            reg_logits[0, location], points.xy[location], points.stride[location], integral
        )
        boxes = clip_boxes_to_image(boxes, (height, width))
        # As in torchvision's `batched_nms`, classes lie further apart than an image is wide, so
        # that boxes of different classes do not suppress each other.
        apart = labels.to(boxes).unsqueeze(1) * (torch.sym_max(height, width) + 1)
        return self._select(boxes + apart, boxes, scores, labels, edge_std, distributions)

    def _candidates(self, cls_levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return score, class and location, (K,) each, of the best candidates of every level."""
        settings = self.detector.config.postprocess
        scores, labels, locations, start = [], [], [], 0
        for logits in cls_levels:
            level = logits[0].sigmoid().flatten()  # (C * H_l * W_l,)
            cells = logits.shape[2] * logits.shape[3]
            score, index = level.topk(torch.sym_min(settings.candidates_per_level, level.shape[0]))
            scores.append(score)
            # The ONNX exporter cannot divide by a free side, so class and cell are looked up.
            classes = logits.shape[1]
            labels.append(torch.arange(classes).unsqueeze(1).repeat(1, cells).flatten()[index])
            locations.append(torch.arange(cells).repeat(classes)[index] + start)
            start = start + cells
        score = torch.cat(scores)
        keep = (score > settings.score_threshold).nonzero().squeeze(1)
        # Two candidates with a score of 0 and classes of their own: the graph needs at least two.
        classes = self.detector.config.model.num_classes
        extra_labels = torch.tensor([classes, classes + 1])
        return (
            torch.cat([score[keep], torch.zeros(2)]),
            torch.cat([torch.cat(labels)[keep], extra_labels]),
            torch.cat([torch.cat(locations)[keep], torch.zeros_like(extra_labels)]),
        )

    def _select(self, apart: Tensor, boxes: Tensor, scores: Tensor, *more: Tensor) -> Any:
        """Return the best detections after NMS of the boxes `apart`, padded to N rows."""
        settings = self.detector.config.postprocess
        scores = scores * ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        keep = nms(apart, scores, settings.nms_iou)
        count = settings.detections_per_image
        rows = [
            pad(values[keep], (0, 0) * (values.dim() - 1) + (0, count))[:count]
            for values in (boxes, scores, *more)
        ]
        return tuple(rows[: len(self.form.outputs)])


def _padded(side: int) -> int:
    # A remainder (-side % 32) would appear in every later size and make tracing three times slower.
    return (side + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE


def metadata(
    config: Config, about: About, form: Form, protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metadata of an exported file."""
    layout = LAYOUT[form.with_nms]
    return {
        "classes": about.classes,
        "category_ids": about.category_ids,
        "short_side": config.data.short_side,
        "long_side": config.data.long_side,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "strides": list(STRIDES),
        "bins": config.model.bins,
        "bin_width": config.model.bin_width,
        "postprocess": config.postprocess.model_dump(mode="json"),
        "input": "images (B, 3, H, W) RGB in 0..255, neither normalised nor padded",
        "scaling": "to fit short_side and long_side; bilinear without antialiasing, in uint8",
        "outputs": {name: layout[name] for name in form.outputs},
        "config_hash": config_hash(config),
        "protocol": dict(protocol),
        "gfl": version("gfl-platform"),
    }


def trace(model: Exportable) -> torch.export.ExportedProgram:
    """Return the graph of a model with free height and width, and a free batch without NMS."""
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    if not model.form.with_nms:
        sides[0] = torch.export.Dim.DYNAMIC
    shape = TRACED if model.form.with_nms else (2, *TRACED[1:])
    images = torch.randint(0, 256, shape).float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`create_unbacked_symint`", FutureWarning)  # torchvision
        # A level may be one cell wide, which the graph must not exclude.
        oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with torch.no_grad(), oblivious:
            return torch.export.export(model, (images,), dynamic_shapes=(sides,))


def save_pt2(program: torch.export.ExportedProgram, path: Path, about: Mapping[str, Any]) -> None:
    """Write a graph as a .pt2 file with its metadata."""
    torch.export.save(program, path, extra_files={METADATA: json.dumps(about)})


def save_onnx(
    program: torch.export.ExportedProgram, path: Path, form: Form, about: Mapping[str, Any]
) -> None:
    """Write a graph as an ONNX file with its metadata."""
    if any("deform_conv2d" in str(node.target) for node in program.graph.nodes):
        raise ExportError("model.backbone.deformable: cannot be exported to ONNX; use --format pt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`create_unbacked_symint`", FutureWarning)  # torchvision
        exported = torch.onnx.export(
            program, input_names=[INPUT], output_names=form.outputs, opset_version=OPSET,
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert exported is not None
    for key, value in about.items():
        exported.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    exported.save(path, external_data=False)
