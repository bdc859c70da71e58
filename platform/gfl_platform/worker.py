"""Training as a worker of a Ray cluster does it: `gfl.engine.fit`, its reports, its checkpoints."""

import json
import tempfile
from pathlib import Path
from typing import Any

from gfl.configfile import config_hash, parse_config
from gfl.data import load_splits
from gfl.engine import EpochReport, StepReport, fit
from gfl.findings import find_cheaply
from gfl.speed import measure_fps
from gfl_platform import cluster
from gfl_platform.events import Event, Events

REPORTS_FILE = "reports.json"
"""In a checkpoint: the reports of steps since the one before."""


class WorkerListener:
    """Reports what a worker's `fit` does: steps to the driver, epochs with checkpoints to Ray."""

    def __init__(self, events: Events) -> None:
        import ray.train

        self._events = events
        self._is_first = ray.train.get_context().get_world_rank() == 0
        self._since_checkpoint: list[Event] = []

    def on_steps(self, report: StepReport) -> None:
        """Tell the driver; without waiting."""
        if self._is_first:
            self._since_checkpoint.append({"kind": "steps", **vars(report)})
            self._events.tell(self._since_checkpoint[-1])

    def repeat(self, checkpoint: Path) -> None:
        """Tell what led to a checkpoint again: its driver may be gone with what it was told."""
        if self._is_first:
            for event in json.loads((checkpoint / REPORTS_FILE).read_text()):
                self._events.tell(event)

    def on_epoch(self, report: EpochReport) -> None:
        """Hand over the checkpoint of rank 0."""
        import ray.train

        facts = {"epoch": report.epoch, "step": report.step, "metrics": report.metrics}
        facts["AP"] = report.metrics["AP"]  # what Ray keeps checkpoints by
        facts["config_hash"] = config_hash(report.config)
        with tempfile.TemporaryDirectory(prefix="gfl-checkpoint-") as folder:
            checkpoint = None
            if self._is_first:
                report.save(Path(folder))
                reports = json.dumps(self._since_checkpoint)
                (Path(folder) / REPORTS_FILE).write_text(reports)
                self._since_checkpoint.clear()
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(facts, checkpoint=checkpoint)


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in one process of the cluster; return what rank 0 measured at the end."""
    import ray.train

    config = parse_config(settings["config"], "job")
    events = settings["events"]
    device = cluster.worker_device()
    splits = load_splits(config)
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        names = ("train", "val")
        facts: dict[str, str | int] = {
            f"{n}.digest": split.digest for n, split in zip(names, splits, strict=True)
        }
        facts |= {f"{n}.images": len(s.records) for n, s in zip(names, splits, strict=True)}
        facts |= {f"train.dropped.{why}": count for why, count in splits[0].dropped.items()}
        findings = [str(finding) for finding in find_cheaply(config, splits[0])]
        events.tell({"kind": "data", "facts": facts, "findings": findings})
    restored, listener = ray.train.get_checkpoint(), WorkerListener(events)
    options = {
        "device": device,
        "failure_folder": Path(settings["folder"]) / "non_finite",
        "teacher": settings["teacher"],
        "report_every": settings["report_every"],
    }
    if restored is None:
        weights = settings["weights"]
        trainer = fit(config, splits, listener, weights=weights, **options)
    else:
        with restored.as_directory() as folder:
            listener.repeat(Path(folder))
            trainer = fit(config, splits, listener, resume=Path(folder), **options)
    if rank != 0:
        return {}
    fps, protocol = measure_fps(trainer.model, splits[1], config, device)
    return {"fps": fps, "protocol": protocol, "epochs": trainer.epochs_done}
