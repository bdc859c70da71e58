"""What tiles find that whole images hide: `python -m benchmarks.tiles FOLDER`, an hour on a core.

FOLDER is `deepforest/data` of the PyPI package deepforest (MIT):

    pip download --no-deps deepforest && unzip deepforest-*.whl

It has an aerial photograph of 2299 x 2472 px with 574 trees. A detector (ResNet-18, from scratch)
learns one half of it and is measured on the other, and the reverse: every tree is held out once.
Tiles keep the photograph's pixels. Whole halves are scaled as the whole photograph would be to fit
within 1333 x 800 px. Both ways take the same number of steps, and in a step the network sees the
same number of pixels within 1 %. Recall is that of all detections, at most 1000 of each half.
Certain recall and precision are those of detections with a score of 0.3 or more.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from gfl.config.loader import derive, load_config
from gfl.config.schema import Config
from gfl.data.split import load_splits
from gfl.data.tiles import sample_records
from gfl.evaluation.coco_eval import CERTAIN
from gfl.evaluation.evaluator import detect
from gfl.structures import Rows
from gfl.train.engine import CheckpointReport, FitOptions, StepReport, build_evaluation_loader, fit

CPU = torch.device("cpu")

IOUS = (0.5, 0.4)

PHOTOGRAPH = "2019_YELL_2_528000_4978000_image_crop2.png"

WAYS = {
    "tiles of 416 px, overlap 96": (4, "data={tiles: {size: 416, overlap: 96}, short_side: 416}"),
    "whole halves": (2, "data={short_side: 400}"),
}
"""Images per step and changes of the configuration."""

COMMON = (
    "model.num_classes=1",
    "data={shapes: null, long_side: 1333, val_batch: 1}",
    "optim.lr=1e-3",
    "schedule.epochs=1",
    "postprocess.detections_per_image=1000",
    "evaluation.max_detections=[1, 10, 1000]",
)


def main() -> None:
    """Train in each way and print its figures."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    made.add_argument("folder", type=Path, help="the folder deepforest/data")
    made.add_argument("--steps", type=int, default=400, help="steps of each training")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="where to write checkpoints")
    arguments = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory() as scratch:
        left, right = write_halves(arguments.folder / PHOTOGRAPH, Path(scratch))
        for way, (batch, changes) in WAYS.items():
            totals: Counter[str] = Counter()
            for train, val in ((left, right), (right, left)):
                of_way = [changes, f"data.batch={batch}", f"optim.lr_batch={batch}"]
                data = [f"data.train={train}", f"data.val={val}", f"seed={arguments.seed}"]
                config = load_config("configs/demo.yaml", [*COMMON, *data, *of_way])
                name = "left" if train == left else "right"
                keep = arguments.keep / f"{batch}-{name}" if arguments.keep else None
                totals.update(count(config, arguments.steps, keep))
            print(way, json.dumps(figures(totals)), flush=True)


def write_halves(photograph: Path, folder: Path) -> list[str]:
    """Write the left and right half as COCO sets; return each as the value of `data.train`.

    A tree belongs to the half that its centre lies in, and its box is clipped to it.
    """
    image = Image.open(photograph).convert("RGB")
    middle = image.width // 2
    tree = ElementTree.parse(photograph.with_suffix(".xml"))
    corners = ("xmin", "ymin", "xmax", "ymax")
    found = (item.find("bndbox") for item in tree.iter("object"))
    boxes = [[float(box.findtext(c, "")) for c in corners] for box in found if box is not None]
    sets = []
    for name, x1, x2 in (("left", 0, middle), ("right", middle, image.width)):
        image.crop((x1, 0, x2, image.height)).save(folder / f"{name}.png")
        annotations = []
        for left, top, right, bottom in boxes:
            if x1 <= (left + right) / 2 < x2:
                low, high = max(left, x1), min(right, x2)
                box = [low - x1, top, high - low, bottom - top]
                annotations.append({"image_id": 1, "category_id": 1, "bbox": box})
        content = {
            "images": [{"id": 1, "file_name": f"{name}.png"}],
            "categories": [{"id": 1, "name": "Tree"}],
            "annotations": [{"id": n, **entry} for n, entry in enumerate(annotations, start=1)],
        }
        (folder / f"{name}.json").write_text(json.dumps(content))
        sets.append(f"{{images: {folder}, annotations: {folder / name}.json}}")
    return sets


class _Recorder:
    """Callbacks of a training: logs the loss and keeps the checkpoint of its end."""

    def __init__(self, keep: Path | None) -> None:
        self._keep = keep

    def on_steps(self, report: StepReport) -> None:
        """Log the loss."""
        logging.info("step %d: loss %.3f", report.step, report.metrics["loss"])

    def on_checkpoint(self, report: CheckpointReport) -> None:
        """Do nothing."""

    def on_epoch(self, report: CheckpointReport) -> None:
        """Write the checkpoint, if it is asked for."""
        if self._keep:
            self._keep.mkdir(parents=True, exist_ok=True)
            report.snapshot().write(self._keep)


def count(config: Config, steps: int, keep: Path | None) -> dict[str, int]:
    """Train about as many `steps` and count what the detector finds in the other half."""
    splits = load_splits(config)
    samples = len(sample_records(splits[0].records, config.data, training=True))
    repeat = ceil(steps * config.data.batch / samples)
    config = derive(Config, config, [f"data.repeat={repeat}"])
    trainer = fit(config, splits, _Recorder(keep), FitOptions(CPU, Path(), report_every=20))
    val = splits[1]
    rows = detect(trainer.model, val, build_evaluation_loader(config, val, CPU), CPU)
    certain = rows[rows[:, 5] >= CERTAIN]
    boxes = torch.tensor(val.records[0].boxes)
    return {
        "trees": len(boxes),
        "detections": len(rows),
        "certain": len(certain),
        **{f"hits at {iou}": hits(boxes, rows, iou) for iou in IOUS},
        **{f"certain hits at {iou}": hits(boxes, certain, iou) for iou in IOUS},
    }


def figures(totals: Mapping[str, int]) -> dict[str, float]:
    """Return recall and precision over both halves."""
    trees, certain = totals["trees"], max(1, totals["certain"])
    return {
        **totals,
        **{f"recall at {iou}": totals[f"hits at {iou}"] / trees for iou in IOUS},
        **{f"certain recall at {iou}": totals[f"certain hits at {iou}"] / trees for iou in IOUS},
        **{f"precision at {iou}": totals[f"certain hits at {iou}"] / certain for iou in IOUS},
    }


def hits(boxes: Tensor, rows: Rows, iou: float) -> int:
    """Return how many objects are found: each detection, best first, takes the nearest free one."""
    found = torch.tensor(rows[:, 1:5]).float()
    found[:, 2:] += found[:, :2]
    overlaps = box_iou(found, boxes)  # (detections, objects)
    free = torch.ones(len(boxes), dtype=torch.bool)
    for detection in torch.tensor(-rows[:, 5]).argsort(stable=True).tolist():
        best, nearest = (overlaps[detection] * free).max(dim=0)
        if best >= iou:
            free[nearest] = False
    return int((~free).sum())


if __name__ == "__main__":
    main()
