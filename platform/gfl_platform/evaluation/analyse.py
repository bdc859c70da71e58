"""Analysis of a checkpoint on a Ray cluster: `report.html`, its figures and its tables.

`analyse_checkpoint` runs in the driver and `analyse_worker` in every worker. All workers detect
objects on their shards of the images; rank 0 analyses all detections and draws the report.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gfl.analysis.analysis import analyse
from gfl.analysis.gallery import pictures_of_edges, pictures_of_errors, pictures_of_worst
from gfl.analysis.report import Report, render_report
from gfl.analysis.tables import tables
from gfl.config.loader import dump_config, reproducible
from gfl.errors import DataError
from gfl.evaluation.bootstrap import measure_gain
from gfl.evaluation.evaluator import gather, predict_split
from gfl.files import write_atomically
from gfl.structures import Predictions, Rows, coco_rows
from gfl.train.engine import build_evaluation_loader
from gfl_platform.cluster.events import Watcher
from gfl_platform.config import JobConfig
from gfl_platform.evaluation.evaluate import Prepared, prepare, progress_of
from gfl_platform.evaluation.measure import run_measurement
from gfl_platform.storage.storage import Storage

EDGE_IMAGES = 48
"""Number of evenly spaced images in which examples of edge distributions are looked for, about."""


def analyse_checkpoint(
    checkpoint: Path,
    job: JobConfig,
    watch: Watcher,
    storage: Storage,
    title: str,
    other: tuple[str, Rows] | None = None,
) -> dict[str, bytes]:
    """Return the files of the analysis of a checkpoint on the images `job.data.val`, by name.

    Args:
        checkpoint: Folder of the checkpoint.
        job: Configuration of the evaluation, and of the cluster to use.
        watch: Shows the progress.
        storage: Where files lie.
        title: Name of the model in the report.
        other: Name and detections of a model to compare with, if there is one.

    Raises:
        ValueError: the checkpoint, dataset or cluster cannot be used.
        JobFailedError: a worker stopped.
    """
    settings = {
        "config": dump_config(reproducible(job)),
        "checkpoint": storage.shared(checkpoint),
        "cache": storage.cache,
        "title": title,
        "other": other,
    }
    files: dict[str, bytes] = run_measurement(analyse_worker, settings, job, storage, watch)
    return files


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write the files of an analysis to `folder`, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)


def analyse_worker(settings: dict[str, Any]) -> dict[str, bytes]:
    """Analyse in one process of the cluster; return the files on rank 0."""
    prepared = prepare(settings)
    split = prepared.split
    if not any(len(record.labels) for record in split.records):
        raise DataError(f"{split.annotations}: no annotations, so there is nothing to analyse")
    loader = build_evaluation_loader(prepared.config, split, prepared.device)
    parts, kept = [np.empty((0, 11))], dict[int, Predictions]()
    stride = max(1, len(split.records) // EDGE_IMAGES)
    progress = progress_of(settings, split)
    for image, predictions in predict_split(prepared.detector, loader, prepared.device, progress):
        rows, edge_std = coco_rows(predictions, split.numbers[image]), predictions.edge_std
        parts.append(np.concatenate([rows, edge_std.double().cpu().numpy()], axis=1))
        if image % stride == 0:
            kept[image] = predictions.cpu()
    together = gather(np.concatenate(parts))
    if together is None:
        return {}
    report = _report(prepared, together[:, :7], together[:, 7:], kept, settings)
    content = tables(report.analysis, split)
    return render_report(report) | {name: text.encode() for name, text in content.items()}


def _report(
    prepared: Prepared,
    rows: Rows,
    edge_std: Rows,
    kept: dict[int, Predictions],
    settings: dict[str, Any],
) -> Report:
    """Return the content of the report; `kept` are detections with their distributions."""
    split, config = prepared.split, prepared.config
    analysis = analyse(split, rows, edge_std, config)
    other, gain = "", None
    if settings["other"]:
        other, baseline = settings["other"]
        gain = measure_gain(split, rows, baseline, config)
    return Report(
        title=settings["title"],
        facts={
            "images": str(len(split.records)),
            "objects": str(len(analysis.matches.object_label)),
            "annotations": split.annotations.name,
            "edges within sigma": f"{float((analysis.edges.ratio <= 1).mean()):.0%}",
        },
        classes=split.classes,
        analysis=analysis,
        errors=pictures_of_errors(analysis, split, split.classes),
        worst=pictures_of_worst(analysis, split, split.classes),
        edges=pictures_of_edges(
            [split.records[image].path for image in kept], list(kept.values()), split.classes
        ),
        other=other,
        gain=gain,
    )
