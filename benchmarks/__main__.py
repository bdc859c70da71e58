"""What `make bench` runs: times, counts and memory beside other detectors, in one table.

    python -m benchmarks [PART ...] [--peer PYTHON] [--device cuda] [--out FILE]

PYTHON has mmdet 3.3.0: MMDetection's GFL then takes its turns beside ours and torchvision's.
Parts are cases such as "train-2x256x320" and "predict-1x800x1216-bfloat16" (see `cases.py`), and
"machine", "convolution", "loading", "evaluation" and "ray".
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import convolution, detectors, evaluation, loading, machine, ray_overhead
from benchmarks.cases import CASES, parse
from benchmarks.ours import network_flops

OTHERS = ("machine", "convolution", "loading", "evaluation", "ray")


def main() -> None:
    """Measure, print the table, write the file."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    made.add_argument("parts", nargs="*", help="what to measure; everything by default")
    made.add_argument("--peer", metavar="PYTHON", help="a Python that has mmdet 3.3.0")
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--beside", default=",".join(detectors.TORCHVISION), help="of torchvision's")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    made.add_argument("--images", type=Path, help="of a set like coco128, by default that")
    made.add_argument("--official", action="store_true", help="run pycocotools, too (a minute)")
    made.add_argument("--out", type=Path, default=Path("outputs/benchmarks.json"))
    arguments = made.parse_args()
    for part in {*arguments.parts} - {*OTHERS}:
        try:
            parse(part)
        except ValueError as error:
            made.error(f"{error}, or one of {', '.join(OTHERS)}")
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "device": str(arguments.device),
    }
    for part in arguments.parts or (*OTHERS[:1], *CASES, *OTHERS[1:]):
        found[part] = measure(part, arguments)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        Console(width=120).print(show(part, found[part]))


def measure(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one part, by contender."""
    match part:
        case "machine":
            return {"peak": machine.peaks(arguments.device)}
        case "convolution":
            return convolution.compare(arguments.rounds)
        case "loading":
            data = Path(os.environ.get("GFL_TEST_DATA", "data"))
            folder = arguments.images or data / "coco128" / "images"
            return loading.compare(folder, arguments.rounds)
        case "evaluation":
            return evaluation.compare(official=arguments.official)
        case "ray":
            return ray_overhead.compare()
    others = arguments.beside.split(",") if arguments.beside else ()
    found = detectors.compare(part, arguments.device, arguments.rounds, arguments.peer, others)
    ours = found["GFL"]
    case = parse(part)
    if case.work != "loss":
        ours["network_gflop"] = network_flops(case) / 1e9
    for name, figures in found.items():
        if name != "GFL":
            ours[f"of_{name}"] = ours["median_s"] / figures["median_s"]
            ours[f"cpu_of_{name}"] = ours["cpu_median_s"] / figures["cpu_median_s"]
            ours[f"memory_of_{name}"] = ours["peak_bytes"] / figures["peak_bytes"]
    return found


def show(part: str, found: dict[str, dict[str, Any]]) -> Table:
    """Return the figures as a table, a row each."""
    table = Table("contender", "figure", "value", title=part, title_justify="left")
    for name, figures in found.items():
        for key, value in figures.items():
            if not isinstance(value, list):
                table.add_row(name, key, f"{value:.4g}" if isinstance(value, float) else str(value))
            name = ""
    return table


if __name__ == "__main__":
    main()
