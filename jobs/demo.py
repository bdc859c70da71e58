"""The whole platform on one machine, as `make demo`: train, evaluate, register, look up, draw."""

import argparse
import json
import time
from pathlib import Path

from jobs.console import Progress, add_overrides, console, parser, run, show_table

EXAMPLE = "python -m jobs.demo"
MODEL = "gfl-demo"
PICTURED = 8


def main() -> None:
    """Run the command line."""
    made = parser(
        "Train configs/demo.yaml, register the model, load it by alias and draw.", EXAMPLE
    )
    add_overrides(made)
    run(demo, made.parse_args())


def demo(arguments: argparse.Namespace) -> None:
    """Run the demo and write `outputs/demo/summary.json`."""
    from gfl.data import load_splits
    from gfl.data.transforms import read_image
    from gfl.predict import Predictor
    from gfl.visualize import draw_predictions
    from gfl_platform import registry, training
    from gfl_platform.config import load_job
    from gfl_platform.storage import storage_root, write_atomically
    from gfl_platform.tracking import tracking_uri

    job = load_job("configs/demo.yaml", arguments.overrides)
    started = time.perf_counter()
    out = storage_root(job) / "demo"
    out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        name = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
        result = training.train(job, name, resume=False, watch=progress.show)
    with result.tracker:
        figures = {"AP": result.metrics["AP"], "fps": result.fps}
        version = registry.register(job, MODEL, result.checkpoint, result.run_id, figures)
        registry.set_alias(job, MODEL, version, "champion")
        predictor = Predictor(*registry.load(job, f"models:/{MODEL}@champion"))
        held_out = load_splits(job)[1].records[:PICTURED]
        images = [read_image(record.path) for record in held_out]
        picture = out / "predictions.png"
        found = [predictor.predict(image) for image in images]
        draw_predictions(images, found, predictor.about.classes, picture)
        result.tracker.file(picture)
    summary = {
        "ap": result.metrics["AP"], "ap50": result.metrics["AP50"], "fps": result.fps,
        "run_id": result.run_id, "model_name": MODEL, "model_version": version,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    show_table("demo", {**summary, "picture": picture})
    console.print("next:", soft_wrap=True)
    images_folder = Path(job.data.val.images)
    for command in (
        f"mlflow ui --backend-store-uri {tracking_uri(job)}",
        "python -m jobs.registry list",
        f"python -m jobs.predict models:/{MODEL}@champion {images_folder}",
    ):
        console.print(f"  {command}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
