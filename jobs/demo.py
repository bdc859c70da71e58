"""The whole platform on one machine, as `make demo`: train, evaluate, register, look up, draw."""

import argparse
import json
import time

from jobs.console.cli import console, parse, parser, run, show_table

MODEL = "gfl-demo"
PICTURED = 8
"""Evaluation images in the picture."""


def main() -> None:
    """Run the command line."""
    about = "Train configs/demo.yaml, register the model, load it by alias and draw."
    run(demo, parse(parser(about, "python -m jobs.demo")))


def demo(arguments: argparse.Namespace) -> None:
    """Run the demo and write `outputs/demo/summary.json`."""
    from gfl.data.images import read_image
    from gfl.data.split import load_splits
    from gfl.files import write_atomically
    from gfl.inference.visualize import draw_predictions
    from gfl_platform.config import load_job
    from gfl_platform.registry import models
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store
    from gfl_platform.training import train
    from jobs.console.progress import Progress

    started = time.perf_counter()
    registered = f"registry={{name: {MODEL}, alias: champion}}"
    job = load_job("configs/demo.yaml", [*arguments.overrides, registered])
    storage = Storage(job.storage)
    store = Store(job.tracking, storage)
    out = storage.root / "demo"
    out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        name = time.strftime("demo-%Y%m%d-%H%M%S")
        result = train.train(job, name, resume=False, watch=progress.show)
    model = models.load(f"models:/{MODEL}@champion", store)
    val = load_splits(storage.cache.localized(job))[1]
    images = [read_image(record.path) for record in val.records[:PICTURED]]
    predictions = [detections.predictions for detections in model.predict(images)]
    picture = out / "predictions.png"
    draw_predictions(images, predictions, model.about.classes, picture)
    assert result.run_id  # `registry.name` needs a store
    store.client.log_artifact(result.run_id, str(picture))
    summary = {
        "ap": result.metrics["AP"], "ap50": result.metrics["AP50"], "fps": result.fps,
        "run_id": result.run_id, "model_name": MODEL, "model_version": result.version,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    gate = " ".join(result.decision.reasons) if result.decision else ""
    show_table("demo", {**summary, "gate": gate, "picture": picture})
    console.print(
        "next, after `. .venv/bin/activate`:\n"
        f"  mlflow ui --backend-store-uri {store.shown_uri}\n"
        "  python -m jobs.registry list\n"
        f"  python -m jobs.predict models:/{MODEL}@champion {job.data.val.images}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
