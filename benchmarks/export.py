"""Exported inference beside eager: `python -m benchmarks.export CHECKPOINT`, a minute.

The same image through the detector and through its ONNX file under onnxruntime, in turns, on the
CPU with the same number of threads; post-processing included in both.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gfl
from gfl.data.images import read_image
from gfl.data.split import load_splits
from gfl.export.export import export, open_onnx, padded, scaled
from gfl.export.exportable import Form
from gfl.inference.predictor import Model
from gfl.model.detector import Detector, folded

ROUNDS = 7
IMAGES = 20


def main() -> None:
    """Print the medians and their ratio."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("model", type=Path, help="checkpoint folder")
    cli.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = cli.parse_args()
    model = gfl.load(arguments.model, device="cpu")
    paths = [record.path for record in load_splits(model.config)[1].records[:IMAGES]]
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "files", ("onnx",), Form(), paths[:4], {})
        run = open_onnx(Path(folder) / "files" / "model.onnx")
        figures = compare(model, run, [scaled(model, read_image(path)) for path in paths])
    print(json.dumps(figures, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


def compare(
    model: Model, run: Callable[[torch.Tensor], Any], images: list[torch.Tensor]
) -> dict[str, float]:
    """Return the median milliseconds an image of both, and their ratio."""
    detector = folded(model.detector)  # as it predicts
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "eager_ms": lambda image: eager(detector, image),
        "onnx_ms": run,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            for image in images:
                way(image)
            taken[name].append(1000 * (time.perf_counter() - start) / len(images))
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return medians | {
        "ratio": medians["onnx_ms"] / medians["eager_ms"], "threads": torch.get_num_threads()
    }  # fmt: skip


def eager(detector: Detector, image: torch.Tensor) -> Any:
    """Predict as the detector does."""
    sizes = torch.tensor([image.shape[-2:]])
    return detector.predict(detector.normalize(padded(image), sizes), sizes)


if __name__ == "__main__":
    main()
