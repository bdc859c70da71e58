"""Look for trouble in a data set: `python -m jobs.inspect CONFIG [key=value ...]`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from jobs.console.cli import console, parse, parser, run

EXAMPLE = "python -m jobs.inspect configs/demo.yaml --draw outputs/samples"
DRAWN = 16


def main() -> None:
    """Run the command line."""
    made = parser(
        "Look for trouble in a data set; the status is 1 if training would fail.", EXAMPLE
    )
    made.add_argument("config", help="YAML file, see configs/")
    made.add_argument("--quick", action="store_true", help="read annotations only, no image")
    made.add_argument("--out", type=Path, metavar="FILE", help="write all of it as JSON")
    made.add_argument("--draw", type=Path, metavar="FOLDER", help="draw samples as training does")
    run(inspect, parse(made))


def inspect(arguments: argparse.Namespace) -> None:
    """Print what is in the data and what is wrong with it; draw samples of data without errors."""
    import torch
    from rich.progress import track

    from gfl.data.dataset import DetectionDataset
    from gfl.data.split import load_splits
    from gfl.errors import DataError
    from gfl.inference.visualize import draw_samples
    from gfl.inspection.findings import check_files, inspect_data
    from gfl_platform.config import load_job
    from gfl_platform.storage.runs import cache_of, write_atomically
    from jobs.console.tables import show_inspection

    torch.set_num_threads(1)  # tensors are small: a second thread would cost more than it does
    config = load_job(arguments.config, arguments.overrides)
    train, val = load_splits(cache_of(config).localized(config))
    paths = [] if arguments.quick else sorted({r.path for r in [*train.records, *val.records]})
    hidden = not console.is_terminal
    files = dict(track(check_files(paths), "reading", len(paths), console=console, disable=hidden))
    with console.status("measuring which edges are in reach"):
        found = inspect_data(config, train, val, files)
    show_inspection(found, config.model)
    if arguments.out:
        write_atomically(arguments.out, json.dumps(asdict(found), indent=1) + "\n")
    if errors := [str(finding) for finding in found.findings if finding.error]:
        raise DataError("; ".join(errors))
    if arguments.draw:
        draw_samples(DetectionDataset(train, config, training=True), arguments.draw, DRAWN)


if __name__ == "__main__":
    main()
