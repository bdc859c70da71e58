"""torchvision's FCOS and RetinaNet at a case: the nearest detectors that come with torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.models import detection

from benchmarks.cases import CLASSES, Case, images, objects


def build_fcos(case: Case, device: torch.device, weights: Path | None) -> Callable[[], Any]:
    """Return what does the work of `case` once."""
    return _build(detection.fcos_resnet50_fpn, case, device)


def build_retinanet(case: Case, device: torch.device, weights: Path | None) -> Callable[[], Any]:
    """Return what does the work of `case` once."""
    return _build(detection.retinanet_resnet50_fpn, case, device)


def _build(make: Any, case: Case, device: torch.device) -> Callable[[], Any]:
    torch.manual_seed(0)
    short, long = sorted((case.height, case.width))  # so that nothing is scaled
    model = make(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=short, max_size=long
    ).to(device)
    for norm in model.modules():  # frozen as ours
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    for frozen in (model.backbone.body.conv1, model.backbone.body.layer1):
        frozen.requires_grad_(False)
    inputs = list(images(case).to(device))
    cast = torch.autocast(device.type, case.precision, enabled=case.precision != torch.float32)
    if case.work == "predict":
        model.eval()

        def predict() -> Any:
            with torch.no_grad(), cast:
                return model(inputs)

        return predict
    targets = [
        {"boxes": b.to(device), "labels": n.to(device)} for b, n in zip(*objects(case), strict=True)
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True)
    model.train()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()

    def step() -> None:
        with cast:
            losses = model(inputs, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step
