"""MMDetection's GFL at a case; runs in a Python that has mmdet 3.3, with the same inputs."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CLASSES, EDGE_BINS, Case, images, logits, objects

CONFIG = ".mim/configs/gfl/gfl_r50_fpn_1x_coco.py"


def build(case: Case, device: torch.device, weights: Path | None) -> Callable[[], Any]:
    """Return what does the work of `case` once."""
    warnings.filterwarnings("ignore")
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.logging import MMLogger

    register_all_modules(init_default_scope=True)
    MMLogger.get_instance("mmengine").setLevel(logging.ERROR)
    config = Config.fromfile(Path(mmdet.__file__).parent / CONFIG)
    config.model.backbone.init_cfg = None
    torch.manual_seed(0)
    model = MODELS.build(config.model).to(device)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    work = {"train": _train, "predict": _predict, "loss": _losses}[case.work]
    enabled = case.precision != torch.float32
    cast = lambda: torch.autocast(device.type, case.precision, enabled=enabled)  # noqa: E731
    return work(case, model, device, cast)


def _train(case: Case, model: Any, device: torch.device, cast: Any) -> Callable[[], Any]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    inputs, samples = images(case).to(device), _samples(case, device)

    def run() -> Any:
        with cast():
            losses, _ = model.parse_losses(model.loss(inputs, samples))
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()

    return run


def _predict(case: Case, model: Any, device: torch.device, cast: Any) -> Callable[[], Any]:
    model.eval()
    inputs, samples = images(case).to(device), _samples(case, device)

    def run() -> Any:
        with torch.no_grad(), cast():
            return model.predict(inputs, samples, rescale=True)

    return run


def _losses(case: Case, model: Any, device: torch.device, cast: Any) -> Callable[[], Any]:
    samples = _samples(case, device)
    metas = [sample.metainfo for sample in samples]
    truths = [sample.gt_instances for sample in samples]
    scores, edges = (
        [level.to(device).requires_grad_() for level in logits(case, channels, mean)]
        for channels, mean in ((CLASSES, -4.0), (4 * EDGE_BINS, 0.0))
    )

    def run() -> Any:
        for level in scores + edges:
            level.grad = None
        losses = model.bbox_head.loss_by_feat(scores, edges, truths, metas)
        model.parse_losses(losses)[0].backward()
        return losses

    return run


def _samples(case: Case, device: torch.device) -> list[Any]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    size = (case.height, case.width)
    shapes = ("img_shape", "pad_shape", "batch_input_shape", "ori_shape")
    facts = {**dict.fromkeys(shapes, size), "scale_factor": (1.0, 1.0)}
    samples = []
    for boxes, labels in zip(*objects(case), strict=True):
        sample = DetDataSample(metainfo=dict(facts))
        sample.gt_instances = InstanceData(bboxes=boxes.to(device), labels=labels.to(device))
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4, device=device), labels=labels[:0].to(device)
        )
        samples.append(sample)
    return samples


def boxes(found: Any) -> list[torch.Tensor]:
    """Return rows of box, score and label, (N, 6), of what `predict` returned."""
    return [
        torch.cat([p.bboxes, p.scores[:, None], p.labels[:, None].to(p.bboxes)], dim=1).cpu()
        for p in (sample.pred_instances for sample in found)
    ]
