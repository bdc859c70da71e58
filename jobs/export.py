"""Write a model as ONNX and .pt2, checked against itself: `python -m jobs.export MODEL`."""

import argparse
from pathlib import Path

from jobs.console.cli import parse, parser, run, show_table

EXAMPLE = "python -m jobs.export models:/gfl-demo@champion --int8 --out outputs/export"
CALIBRATION = 64


def main() -> None:
    """Run the command line."""
    cli = parser("Export a model; each file is checked against the model first.", EXAMPLE)
    cli.add_argument("model", help="checkpoint folder, models:/NAME@ALIAS or runs:/ID")
    cli.add_argument("--format", nargs="+", choices=("onnx", "pt2"), default=("onnx", "pt2"))
    cli.add_argument("--no-nms", action="store_true", help="output every location, without NMS")
    cli.add_argument(
        "--distributions", action="store_true", help="add the edge distributions as an output"
    )
    cli.add_argument(
        "--int8", action="store_true", help="also write an int8 ONNX file, and measure its AP"
    )
    cli.add_argument("--images", type=Path, help="image or folder to check on (default: data.val)")
    cli.add_argument("--check", type=int, default=16, help="images to check on (default 16)")
    cli.add_argument("--out", type=Path, default=Path("outputs/export"), metavar="FOLDER")
    run(export, parse(cli))


def export(arguments: argparse.Namespace) -> None:
    """Export a model, compare each file with it, and show the differences."""
    import gfl
    from gfl.checkpoint.files import read_about, read_config
    from gfl.config.loader import derive
    from gfl.data.split import read_split
    from gfl.data.synthetic import render_shapes
    from gfl.export.export import export as export_checked
    from gfl.export.export import quantize
    from gfl.export.exportable import Form
    from gfl.inference.predictor import image_files
    from gfl_platform.cluster.events import ItemsDone
    from gfl_platform.config import JobConfig, job_of
    from gfl_platform.registry import model_card, models
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store
    from jobs.console.progress import Progress

    if arguments.int8 and (arguments.no_nms or "onnx" not in arguments.format):
        raise ValueError("--int8: needs an ONNX file with NMS; leave out --no-nms, add onnx")
    if arguments.check < 1:
        raise ValueError(f"--check {arguments.check}: expected at least 1")
    where = job_of(arguments.overrides)
    store = Store(where.tracking, Storage(where.storage))
    with store.storage.scratch_folder() as scratch:
        resolved = models.resolve(store, arguments.model)  # an alias may move during the export
        checkpoint = models.fetch_checkpoint(store, resolved, scratch)
        job = derive(JobConfig, read_config(checkpoint), arguments.overrides)
        model = gfl.load(checkpoint, job, device="cpu")
        classes = read_about(checkpoint).classes
    images = image_files([arguments.images]) if arguments.images else []
    if arguments.int8 or not images:
        local = Storage(job.storage).cache.localized(job)
        render_shapes(local)
        val = read_split(local.data, "val", job.model.num_classes, classes)
        images = images or [record.path for record in val.records]
    if arguments.int8:  # before minutes are spent on the other files
        train = read_split(local.data, "train", job.model.num_classes, classes)
    images = images[: arguments.check]
    form = Form(not arguments.no_nms, arguments.distributions)
    protocol = model_card.protocol_of(store, resolved)
    comparisons = export_checked(model, arguments.out, arguments.format, form, images, protocol)
    for name, figures in comparisons.items():
        show_table(str(arguments.out / name), {"images": len(images), **figures})
    if arguments.int8:
        paths = [record.path for record in train.records[:CALIBRATION]]
        with Progress() as progress:

            def show_progress(done: int, total: int) -> None:
                progress.show(ItemsDone("images predicted", done, total))

            figures = quantize(model, arguments.out, paths, val, show_progress)
        show_table(str(arguments.out / "model.int8.onnx"), figures)


if __name__ == "__main__":
    main()
