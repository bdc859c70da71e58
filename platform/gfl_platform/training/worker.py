"""A training worker on the Ray cluster: `gfl.train.engine.fit`, its reports and checkpoints."""

import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from gfl.checkpoint.files import require_whole
from gfl.checkpoint.snapshot import Snapshot
from gfl.config.loader import config_hash, parse_config
from gfl.config.schema import Config
from gfl.data.split import Split, load_splits
from gfl.distributed import worker_rank
from gfl.errors import LeaveError
from gfl.evaluation.speed import measure_fps
from gfl.inspection.findings import find_cheaply
from gfl.train.engine import CheckpointReport, EpochReport, StepReport, fit
from gfl_platform.cluster import launch, resources
from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import (
    CheckpointDamaged,
    CheckpointStored,
    DataDescribed,
    EpochEvaluated,
    Event,
    StepsDone,
    WorkersStarted,
    from_json,
    to_json,
)
from gfl_platform.cluster.preflight import problem_of_any_worker, same_on_all_nodes
from gfl_platform.storage.cache import Cache
from gfl_platform.storage.files import StorageError, space_required
from gfl_platform.storage.s3 import patiently

LEAVE_SECONDS = 90.0
"""For the last checkpoint before a node goes: less than the notice of two minutes."""

UNSTORED = "gfl-unstored-"
"""Begins the names of folders, among the node's temporary files, of checkpoints to be stored."""

UNSTORED_SECONDS = 3600.0
"""Age of such a folder after which nobody is storing it any more."""

COPY_CHUNK_BYTES = 64 * 2**20
"""Size of the parts in which the files of a checkpoint are copied to where they are stored."""

REPORTS_FILE = "reports.json"
"""In a checkpoint: the reports of steps since the one before."""


class WorkerListener:
    """Reports what a worker's `fit` does: steps to the driver, checkpoints to Ray.

    Training waits for a checkpoint's copy into the host's memory, and for the one before if that
    is not stored by then; a thread writes it.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._context = ray.train.get_context()
        self.is_first = self._context.get_world_rank() == 0
        self._since_checkpoint: list[Event] = []
        self._storing = threading.Semaphore()

    def on_steps(self, report: StepReport) -> None:
        """Tell the driver; without waiting."""
        if self.is_first:
            steps = StepsDone(**vars(report))
            self._since_checkpoint.append(steps)
            self._events.tell(steps)

    def repeat(self, checkpoint: Path, uri: str) -> None:
        """Tell of a checkpoint, and what led to it, again: a driver that died may not have heard.

        Args:
            checkpoint: A copy of it.
            uri: Where it lies.
        """
        if not self.is_first:
            return
        for record in json.loads((checkpoint / REPORTS_FILE).read_text()):
            match from_json(record):
                case StepsDone() as steps:
                    self._events.tell(replace(steps, repeated=True))
                case EpochEvaluated() as evaluated:
                    self._events.tell(replace(evaluated, uri=uri, repeated=True))

    def on_damage(self, reason: str) -> None:
        """Tell of a checkpoint that is damaged; all workers see the same."""
        if self.is_first:
            self._events.tell(CheckpointDamaged(reason))

    def on_checkpoint(self, report: CheckpointReport) -> None:
        """Hand over a checkpoint within an epoch."""
        self._hand_over(report, None)

    def on_epoch(self, report: EpochReport) -> None:
        """Hand over the checkpoint of an epoch; Ray keeps those of the best AP."""
        self._hand_over(report, report.metrics)

    def wait_until_written(self) -> None:
        """Wait for the thread that writes the last checkpoint."""
        with self._storing:
            pass

    def _hand_over(self, report: CheckpointReport, metrics: dict[str, float] | None) -> None:
        """Report a checkpoint to Ray; `metrics` are those of an epoch that has been evaluated."""
        facts: dict[str, Any] = {"epoch": report.epoch, "step": report.step}
        facts["config_hash"] = config_hash(report.config)
        if metrics is not None:
            # Ray Train and Ray Tune look at what is not nested.
            facts |= {"metrics": metrics, **metrics}
        checkpoint = store = None
        if self.is_first:
            started = time.perf_counter()
            self._storing.acquire()
            # Ray wants a folder at once, and deletes it when `store` has filled and copied it.
            checkpoint = Checkpoint.from_directory(tempfile.mkdtemp(prefix=UNSTORED))
            snapshot = report.snapshot()
            blocked_seconds = time.perf_counter() - started
            if metrics is not None:
                evaluated = EpochEvaluated(report.step, report.epoch, metrics)
                self._since_checkpoint.append(evaluated)
            reports = json.dumps([to_json(event) for event in self._since_checkpoint])
            store = self._store(snapshot, reports, report.step, blocked_seconds)
            self._since_checkpoint.clear()
        ray.train.report(
            facts,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=store,
        )

    def _store(
        self, snapshot: Snapshot, reports: str, step: int, blocked_seconds: float
    ) -> Callable[[Checkpoint, str], Checkpoint]:
        """Return the function that stores a checkpoint, and tells the driver how long it took.

        Args:
            snapshot: The content of the checkpoint.
            reports: The content of its `REPORTS_FILE`.
            step: Number of steps done.
            blocked_seconds: Seconds that training waited for the snapshot.
        """
        storage = self._context.get_storage()
        filesystem, run_folder = storage.storage_filesystem, storage.experiment_fs_path

        def store(checkpoint: Checkpoint, name: str) -> Checkpoint:
            folder, started = Path(checkpoint.path), time.perf_counter()
            stored = Checkpoint(f"{run_folder}/{name}", filesystem)
            try:
                with space_required(tempfile.gettempdir()):
                    snapshot.write(folder, {REPORTS_FILE: reports})
                _require_shared(filesystem, run_folder)
                with space_required(run_folder):
                    patiently(lambda: _copy(folder, stored), OSError)
            except BaseException:
                with suppress(OSError):  # a half, which on a full device would be in the way
                    filesystem.delete_dir(stored.path)
                raise
            finally:
                self._storing.release()
            seconds = {
                "checkpoint_blocked_seconds": blocked_seconds,
                "checkpoint_seconds": time.perf_counter() - started,
            }
            self._events.tell(CheckpointStored(step, seconds))
            return stored

        return store


def remove_abandoned() -> None:
    """Delete checkpoints that killed workers had not stored: they would fill the device."""
    for folder in Path(tempfile.gettempdir()).glob(f"{UNSTORED}*"):
        with suppress(OSError):  # another worker may delete it, too
            if folder.stat().st_mtime < time.time() - UNSTORED_SECONDS:
                shutil.rmtree(folder)


def _require_shared(filesystem: pyarrow.fs.FileSystem, folder: str) -> None:
    """Check that this node sees the run's folder, which the training controller has made.

    Raises:
        StorageError: it does not.
    """
    if filesystem.get_file_info(folder).type == pyarrow.fs.FileType.NotFound:
        raise StorageError(
            f"{folder}: not there on {socket.gethostname()}, so checkpoints would be lost; set "
            "storage.root to a folder that all nodes share, or to s3://BUCKET/PREFIX"
        )


def _copy(folder: Path, stored: Checkpoint) -> None:
    """Copy a checkpoint on this node to where it is stored."""
    filesystem = stored.filesystem
    filesystem.create_dir(stored.path)
    pyarrow.fs.copy_files(
        str(folder),
        stored.path,
        destination_filesystem=filesystem,
        chunk_size=COPY_CHUNK_BYTES,
        # Arrow may hang in uploads to S3 from several threads (apache/arrow#32372).
        use_threads=filesystem.type_name != "s3",
    )


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in one process of the cluster; return what rank 0 measured at the end."""
    config = parse_config(settings["config"], "job")
    events, cache = settings["events"], settings["cache"]
    device = resources.worker_device()
    splits = same_on_all_nodes(lambda: load_splits(cache.localized(config)))
    remove_abandoned()
    listener = WorkerListener(events)
    if listener.is_first:
        count = worker_rank()[1]
        events.tell(WorkersStarted(count, resources.node_count()))
        events.tell(_describe(config, splits))
    options = {
        "device": device,
        "failure_folder": Path(settings["folder"]) / "non_finite",
        "teacher": settings["teacher"] and cache.local(settings["teacher"]),
        "report_every": settings["report_every"],
        "checkpoint_every": settings["checkpoint_every"],
        "shares": settings["shares"],
        "leave": _node_is_drained,
    }
    restored = _latest_whole_checkpoint(cache, listener.on_damage)
    if restored is None:
        options["weights"] = settings["weights"] and cache.local(settings["weights"])
    else:
        listener.repeat(*restored)
        options["resume"] = restored[0]
    try:
        trainer = fit(config, splits, listener, **options)
    except LeaveError:
        _wait_until_stored()
        raise
    if not listener.is_first:
        return {}
    listener.wait_until_written()
    fps, protocol = measure_fps(trainer.model, splits[1], config, device)
    return {"fps": fps, "protocol": protocol, "epochs": trainer.epochs_done}


def _node_is_drained() -> bool:
    """Return whether a node of this training is about to go away; the same on all workers.

    To be called on every worker: they wait for each other, some milliseconds.
    """
    return ray.train.get_preemption_info() is not None


def _wait_until_stored() -> None:
    """Wait until Ray has noted the last checkpoint, from which the others will go on."""
    committed = ray.train.CheckpointConsistencyMode.COMMITTED
    ray.train.get_all_reported_checkpoints(consistency_mode=committed, timeout_s=LEAVE_SECONDS)


def _describe(config: Config, splits: tuple[Split, Split]) -> DataDescribed:
    """Return digests and sizes of the data, and what looks suspicious in it."""
    facts: dict[str, str | int] = {}
    for name, split in zip(("train", "val"), splits, strict=True):
        facts |= {f"{name}.digest": split.digest, f"{name}.images": len(split.records)}
    facts |= {f"train.dropped.{why}": count for why, count in splits[0].dropped.items()}
    findings = [str(finding) for finding in find_cheaply(config, splits[0])]
    return DataDescribed(facts, findings)


def _latest_whole_checkpoint(cache: Cache, tell: Callable[[str], None]) -> tuple[Path, str] | None:
    """Return a copy of the latest checkpoint that is as it was written, and where it lies.

    It is the same on all workers, and None at first.

    Args:
        cache: Where the node keeps its copy of what lies on S3.
        tell: Is told why another is passed over.

    Raises:
        StorageError: there are some, but all are damaged.
    """
    latest = ray.train.get_checkpoint()
    if latest is None:
        return None
    reason = ""
    for checkpoint in (latest, *_others_newest_first(latest)):
        uri, problem = launch.uri_of(checkpoint), ""
        folder = cache.local(uri)
        try:
            require_whole(folder)
        except ValueError as error:
            problem = str(error)
        reason = problem_of_any_worker(problem)
        if not reason:
            return folder, uri
        tell(reason)
    raise StorageError(f"{reason}; there is no other: start anew under another run.name")


def _others_newest_first(latest: Any) -> Iterator[Any]:
    known = ray.train.get_all_reported_checkpoints()
    known.sort(key=lambda reported: reported.metrics["step"], reverse=True)
    yield from (each.checkpoint for each in known if each.checkpoint.path != latest.path)
