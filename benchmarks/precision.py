"""What bfloat16 costs in AP: `python -m benchmarks.precision CHECKPOINT`, some minutes on a CPU.

The images that a checkpoint is evaluated on, in float32 and with the network under autocast, as
`jobs.benchmark --precision bfloat16` times it.
"""

import argparse
import json
from pathlib import Path

import torch

from gfl.checkpoint.snapshot import load_checkpoint
from gfl.data.split import load_splits
from gfl.evaluation.coco_eval import evaluate_split
from gfl.evaluation.evaluator import detect
from gfl.model.detector import place
from gfl.train.engine import build_evaluation_loader


def main() -> None:
    """Print the AP of both, and the difference in points."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("model", type=Path, help="checkpoint folder")
    try:
        figures = compare(made.parse_args().model)
    except ValueError as error:  # no checkpoint, or not the images it is evaluated on
        made.error(str(error))
    print(json.dumps(figures, indent=1))


def compare(checkpoint: Path) -> dict[str, float]:
    """Return the AP in float32 and in bfloat16, and how many points (0.01) the second gains."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector, _ = load_checkpoint(checkpoint)
    place(detector, device)
    split = load_splits(detector.config)[1]
    found = {}
    for precision in (torch.float32, torch.bfloat16):
        loader = build_evaluation_loader(detector.config, split, device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            rows = detect(detector, split, loader, device)
        name = str(precision).removeprefix("torch.")
        found[name] = evaluate_split(split, rows, detector.config).metrics["AP"]
    one, other = found.values()
    return {**found, "points": 100 * (other - one)}


if __name__ == "__main__":
    main()
