"""This project's detector at a case."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import gfl
from benchmarks.cases import CLASSES, EDGE_BINS, Case, images, logits, objects
from gfl.config.schema import Config
from gfl.data.annotations import OBJECT, Annotations
from gfl.data.dataset import Batch
from gfl.data.split import ImageRecord, Split
from gfl.model.detector import Detector, folded, place
from gfl.structures import pad_targets
from gfl.train.trainer import Trainer

CONFIG = "configs/gfl_r50_1x.yaml"


def build(case: Case, device: torch.device, weights: Path | None) -> Callable[[], Any]:
    """Return what does the work of `case` once."""
    precision = str(case.precision).removeprefix("torch.")
    overrides = [f"data.batch={case.batch}", f"optim.precision={precision}", "optim.lr=1e-6"]
    overrides += ["optim.compile=true"] if case.compiled else []
    config = gfl.load_config(CONFIG, overrides)
    if case.work == "train":
        return _train(case, config, device)
    detector = Detector(config)
    if weights is not None:
        detector.load_state_dict(torch.load(weights, weights_only=True))
    if case.work == "predict":  # as `gfl.load` does
        return _predict(case, folded(place(detector, device)), device)
    return losses_of(case, place(detector, device), device)


def _train(case: Case, config: Config, device: torch.device) -> Callable[[], Any]:
    """Return a step as `jobs.train` does it: normalisation of uint8 pixels to finite gradients."""
    size = (case.height, case.width)
    boxes, labels = objects(case)
    record = ImageRecord(1, Path("none"), size, boxes[0].numpy(), labels[0].numpy())
    split = Split(
        [record] * case.batch,
        [str(n) for n in range(CLASSES)],
        list(range(CLASSES)),
        {},
        Path("none"),
        "",
        Annotations([], [], np.empty((0, 2), np.int64), [], np.empty(0, OBJECT), ""),
    )
    trainer = Trainer(config, split, device)
    trainer.parallel.train()
    sizes = torch.tensor([size] * case.batch)
    pixels = (images(case) * 58 + 120).clamp(0, 255).to(torch.uint8)
    numbers = torch.arange(case.batch)
    batch = Batch(pixels, pad_targets(boxes, labels, sizes), numbers, sizes).to(device)
    return lambda: trainer.train_step(batch)


def _predict(case: Case, detector: Detector, device: torch.device) -> Callable[[], Any]:
    inputs = images(case).to(device).contiguous(memory_format=torch.channels_last)
    enabled = case.precision != torch.float32
    detector.requires_grad_(enabled)  # autocast keeps its copies of such weights alone,
    torch.autocast(device.type, case.precision, enabled=enabled).__enter__()  # for as long as it is
    return lambda: detector.predict(inputs)


def losses_of(case: Case, detector: Detector, device: torch.device) -> Callable[[], Any]:
    """Return what assigns, and computes losses and their gradients, of made-up outputs."""
    sizes = torch.tensor([(case.height, case.width)] * case.batch)
    targets = pad_targets(*objects(case), sizes)
    targets = type(targets)(**{k: v.to(device) for k, v in vars(targets).items()})
    outputs = tuple(
        [level.to(device).requires_grad_() for level in logits(case, channels, mean)]
        for channels, mean in ((CLASSES, -4.0), (4 * EDGE_BINS, 0.0))
    )

    def run() -> Any:
        for level in outputs[0] + outputs[1]:
            level.grad = None
        losses = detector.criterion.losses(outputs, targets)
        torch.stack(list(losses.values())).sum().backward()
        return losses

    return run


def boxes(found: Any) -> list[torch.Tensor]:
    """Return rows of box, score and label, (N, 6), of what `predict` returned."""
    return [
        torch.cat([p.boxes, p.scores[:, None], p.labels[:, None].to(p.boxes)], dim=1).cpu()
        for p in found
    ]


def stirred(folder: Path) -> tuple[Path, Path]:
    """Write weights with which something is found, as ours and under MMDetection's names."""
    torch.manual_seed(0)
    detector = Detector(gfl.load_config(CONFIG))
    with torch.no_grad():
        detector.head.cls_logits.weight.normal_(std=0.05)
        detector.head.reg_logits.weight.normal_(std=0.05)
        for norm in detector.modules():
            if isinstance(norm, torch.nn.BatchNorm2d) and norm.num_features >= 256:
                norm.weight.mul_(0.5)
    mine, theirs = folder / "ours.pt", folder / "mmdetection.pt"
    torch.save(detector.state_dict(), mine)
    torch.save(gfl.export_mmdet(detector), theirs)
    return mine, theirs


def network_flops(case: Case) -> int:
    """Return the floating-point operations of the network at a case, backward pass included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        detector = Detector(gfl.load_config(CONFIG)).train(case.work == "train")
        inputs = torch.empty(case.batch, 3, case.height, case.width)
        outputs = detector(inputs)
        if case.work == "train":
            sum(level.sum() for levels in outputs for level in levels).backward()
    return int(counter.get_total_flops())
