"""Training processes without Ray (a gloo group of spawned workers), and forms of test data."""

import math
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gfl.config.schema import Config
from gfl.data.split import Split
from gfl.evaluation.coco_eval import evaluate_split
from gfl.model.boxes import STRIDES, box_iou
from gfl.model.detector import Detector
from gfl.structures import Predictions, Rows

# Workers start with what takes most of their time to import.
mp.get_context("forkserver").set_forkserver_preload(
    ["gfl.train.engine", "gfl.evaluation.evaluator"]
)


def run_workers(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(rank, *arguments)` returned on each of `count` workers in one group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        given = (count, port, folder, work, arguments)
        mp.start_processes(_work, given, nprocs=count, start_method="forkserver")
        results = [Path(folder) / f"{rank}.pt" for rank in range(count)]
        return [torch.load(path, weights_only=False) for path in results]


def _work(rank: int, count: int, port: int, folder: str, work: Any, arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def as_rows(records: Iterable[dict[str, Any]]) -> Rows:
    """Return COCO's result records as `gfl.evaluation.coco_eval` takes them."""
    rows = [[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in records]
    return np.array(rows, dtype=float).reshape(-1, 7)


def level_sizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) in cells of each level for an input of `height` x `width` px."""
    return tuple((math.ceil(height / step), math.ceil(width / step)) for step in STRIDES)


def attentive_detector(config: Config) -> Detector:
    """Return an untrained detector that finds something in many places, each with its own score."""
    torch.manual_seed(0)
    detector = Detector(config).eval()
    with torch.no_grad():
        for convolution in (detector.head.cls_logits, detector.head.reg_logits):
            assert convolution.bias is not None
            convolution.bias.zero_()
        levels = detector(torch.randn(1, 3, 96, 96))
        for convolution, outputs in zip(
            (detector.head.cls_logits, detector.head.reg_logits), levels, strict=True
        ):
            spread = torch.cat([output.flatten() for output in outputs]).std()
            convolution.weight.mul_(1.5 / spread)
    return detector


def learn_one_batch_by_heart(detector: Detector) -> list[Predictions]:
    """Train 80 steps on two images, check that their objects are found, return the detections."""
    images = torch.zeros(2, 3, 64, 64)
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([[20.0, 4.0, 60.0, 32.0]])]
    labels = [torch.tensor([0]), torch.tensor([2])]
    for image, ((x1, y1, x2, y2),), label in zip(images, boxes, labels, strict=True):
        image[label, int(y1) : int(y2), int(x1) : int(x2)] = 2.0
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5  # statistics follow the weights closely
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3, fused=True)
    for _ in range(80):
        optimizer.zero_grad()
        sum(detector.losses(images, boxes, labels).values()).backward()
        optimizer.step()
    found = detector.predict(images)
    for one, box, label in zip(found, boxes, labels, strict=True):
        assert one.labels[0] == label
        assert box_iou(one.boxes[0], box[0]) > 0.8
    return found


def average_precision(split: Split, detections: list[dict[str, Any]]) -> float:
    """Return the AP of COCO detection records on all images of `split`."""
    rows = [[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in detections]
    measured = evaluate_split(split, np.array(rows, dtype=float), Config())
    return measured.metrics["AP"]
