"""What every worker of an evaluation does; imported by them alone, for it needs torch."""

from typing import Any

from gfl.checkpoint.snapshot import load_checkpoint
from gfl.config.loader import parse_config
from gfl.data import render_shapes
from gfl.data.errors import DataError
from gfl.data.split import read_split, require_same_classes
from gfl.evaluation.coco_eval import evaluate_split
from gfl.evaluation.evaluator import detect, gather
from gfl.evaluation.protocol import data_digest
from gfl.evaluation.speed import measure_fps
from gfl.model.detector import place
from gfl.train.engine import build_evaluation_loader
from gfl.train.trainer import worker_rank
from gfl_platform.cluster import launch


def evaluate_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluate this worker's share; return what all of them found together."""
    config = parse_config(settings["config"], "job")
    device = launch.worker_device()
    cache = settings["cache"]
    config = cache.localized(config)
    detector, about = load_checkpoint(cache.local(settings["checkpoint"]), config)
    place(detector, device)
    render_shapes(config)
    split = read_split(config.data, "val", config.model.num_classes, about.classes)
    require_same_classes("the model", about.classes, str(split.annotations), split.classes)
    if not settings["results"] and not any(len(record.labels) for record in split.records):
        raise DataError(
            f"{split.annotations}: no annotations, so nothing can be measured; write the "
            "detections with --results FILE"
        )
    rank, world = worker_rank()

    def tell(images: int) -> None:
        total = len(split.records)
        done = {"kind": "evaluated", "images": min(images * world, total), "total": total}
        settings["events"].tell(done)

    loader = build_evaluation_loader(config, split, device)
    rows = gather(detect(detector, split, loader, device, tell if rank == 0 else None))
    if rows is None:
        return {}
    found = evaluate_split(split, rows, config, official=settings["official"])
    fps, protocol = measure_fps(detector, split, config, device)
    figures = {"fps": fps, "protocol": protocol, "images": len(split.records)}
    figures["digest"] = data_digest(protocol)
    return vars(found) | figures | {"detections": rows}
