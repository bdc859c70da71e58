"""Does `edge_std` know where edges are wrong? `python -m benchmarks.uncertainty CHECKPOINT`.

Detections of held-out images that hit an object of their class (IoU 0.5 or more) have an error at
each edge. Its rank correlation (Spearman) with the deviation of the learned distribution is
1 if the model always knows which edges are worse, 0 if it has no idea.
"""

import argparse
import json
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torchvision.ops import box_iou

import gfl
from gfl.data.split import load_splits
from gfl.inference.predictor import Model

MIN_SCORE, MIN_IOU = 0.3, 0.5


def main() -> None:
    """Print the correlation over all edges, and of each."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("model", type=Path, help="checkpoint folder")
    arguments = made.parse_args()
    model = gfl.load(arguments.model)
    std, error = edges(model)
    sides = {
        name: float(spearmanr(std[:, side], error[:, side]).statistic)
        for side, name in enumerate(("left", "top", "right", "bottom"))
    }
    together = float(spearmanr(std.flatten(), error.flatten()).statistic)
    print(json.dumps({"edges": std.numel(), "correlation": together, **sides}, indent=1))


def edges(model: Model) -> tuple[Tensor, Tensor]:
    """Return `edge_std` and the true error of the edges of all detections that hit, (N, 4) px."""
    spread, errors = [torch.empty(0, 4)], [torch.empty(0, 4)]
    for record in load_splits(model.config)[1].records:
        (found,) = model.predict(record.path, min_score=MIN_SCORE)
        if not len(found) or not len(record.boxes):
            continue
        boxes, labels = torch.tensor(record.boxes), torch.tensor(record.labels)
        iou = box_iou(found.boxes, boxes)
        iou = iou * (found.labels[:, None] == labels)
        best, which = iou.max(dim=1)
        hits = best >= MIN_IOU
        spread.append(found.edge_std[hits])
        errors.append((found.boxes - boxes[which]).abs()[hits])
    return torch.cat(spread), torch.cat(errors)


if __name__ == "__main__":
    main()
