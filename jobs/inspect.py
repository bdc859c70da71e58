"""Check a dataset: `python -m jobs.inspect CONFIG [key=value ...]`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from jobs.console.cli import console, parse, parser, run

EXAMPLE = "python -m jobs.inspect configs/demo.yaml --draw outputs/samples"
DRAWN = 16


def main() -> None:
    """Run the command line."""
    cli = parser("Check a dataset; the exit status is 1 if training would fail.", EXAMPLE)
    cli.add_argument("config", help="YAML file, see configs/")
    cli.add_argument("--quick", action="store_true", help="read annotations only, not images")
    cli.add_argument("--out", type=Path, metavar="FILE", help="write the findings as JSON")
    cli.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="draw training samples with their boxes"
    )
    run(inspect, parse(cli))


def inspect(arguments: argparse.Namespace) -> None:
    """Print statistics and findings of the data; draw samples if there is no error."""
    import torch
    from rich.progress import track

    from gfl.data.dataset import DetectionDataset
    from gfl.data.split import load_splits
    from gfl.errors import DataError
    from gfl.files import write_atomically
    from gfl.inference.visualize import draw_augmentation, draw_samples
    from gfl.inspection.findings import check_files, inspect_data
    from gfl_platform.config import load_job
    from gfl_platform.storage.storage import Storage
    from jobs.console.tables import show_inspection

    torch.set_num_threads(1)  # for tensors this small, one thread is faster than two
    config = load_job(arguments.config, arguments.overrides)
    train, val = load_splits(Storage(config.storage).cache.localized(config))
    paths = [] if arguments.quick else sorted({r.path for r in [*train.records, *val.records]})
    hidden = not console.is_terminal
    files = dict(track(check_files(paths), "reading", len(paths), console=console, disable=hidden))
    with console.status("measuring the regression range"):
        inspection = inspect_data(config, train, val, files)
    show_inspection(inspection, config.model)
    if arguments.out:
        write_atomically(arguments.out, json.dumps(asdict(inspection), indent=1) + "\n")
    if errors := [str(finding) for finding in inspection.findings if finding.error]:
        raise DataError("; ".join(errors))
    if arguments.draw:
        dataset = DetectionDataset(train, config, training=True)
        draw_samples(dataset, arguments.draw, DRAWN)
        draw_augmentation(dataset, arguments.draw / "augmentation.png")


if __name__ == "__main__":
    main()
