"""One process of a training on Ray: it runs `gfl.train.engine.fit`, reports and stores checkpoints.

`train_worker` is what Ray runs in every worker.
"""

import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from gfl.checkpoint.files import read_about, require_whole
from gfl.checkpoint.snapshot import Snapshot
from gfl.config.loader import config_hash, parse_config
from gfl.config.schema import Config
from gfl.data.split import Split, load_splits
from gfl.distributed import worker_rank
from gfl.errors import PreemptedError
from gfl.evaluation.speed import measure_fps
from gfl.inspection.findings import find_cheaply
from gfl.train.engine import CheckpointReport, EpochReport, FitOptions, StepReport, fit
from gfl.train.trainer import Start
from gfl_platform.cluster import launch, resources
from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import (
    CheckpointDamaged,
    CheckpointStored,
    DataDescribed,
    EpochEvaluated,
    Event,
    StepsDone,
    TagsSet,
    WorkersStarted,
    from_json,
    to_json,
)
from gfl_platform.cluster.preflight import problem_of_any_worker, same_on_all_nodes
from gfl_platform.storage.cache import Cache
from gfl_platform.storage.files import StorageError, space_required
from gfl_platform.storage.s3 import patiently
from gfl_platform.training.conditions import (
    CONDITIONS_FILE,
    find_conditions,
    require_same_conditions,
)

LEAVE_SECONDS = 90.0
"""Time to store the last checkpoint before a node goes: less than the notice of two minutes."""

UNSTORED = "gfl-unstored-"
"""Prefix of the names of temporary folders with checkpoints that are not stored yet."""

UNSTORED_SECONDS = 3600.0
"""Age of such a folder after which nobody is storing it any more."""

COPY_CHUNK_BYTES = 64 * 2**20
"""Size of the parts in which the files of a checkpoint are copied to where they are stored."""

REPORTS_FILE = "reports.json"
"""File in a checkpoint with the events since the checkpoint before, as JSON."""


class WorkerListener:
    """Reports the steps of a worker to the driver, and its checkpoints to Ray.

    Training waits while a checkpoint is copied into the host's memory. A thread of Ray writes it
    to storage meanwhile; the next checkpoint waits until that is done.
    """

    def __init__(self, events: Events, conditions: Mapping[str, str]) -> None:
        self._events = events
        self._files = {CONDITIONS_FILE: json.dumps(conditions, indent=1)}
        self._context = ray.train.get_context()
        self.is_first = self._context.get_world_rank() == 0
        self._since_checkpoint: list[Event] = []
        self._storing = threading.Semaphore()

    def on_steps(self, report: StepReport) -> None:
        """Tell the driver about some steps, without waiting."""
        if self.is_first:
            steps = StepsDone(**vars(report))
            self._since_checkpoint.append(steps)
            self._events.tell(steps)

    def repeat(self, checkpoint: Path, uri: str) -> None:
        """Repeat the events that led to a checkpoint: a driver that died may have missed them.

        Args:
            checkpoint: Folder of a copy of the checkpoint on this node.
            uri: Folder of the checkpoint, a path or `s3://...`.
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
        """Tell the driver that a checkpoint is damaged, which all workers have agreed on."""
        if self.is_first:
            self._events.tell(CheckpointDamaged(reason))

    def on_checkpoint(self, report: CheckpointReport) -> None:
        """Report a checkpoint within an epoch."""
        self._hand_over(report, None)

    def on_epoch(self, report: EpochReport) -> None:
        """Report the checkpoint of an epoch; Ray keeps those with the best AP."""
        self._hand_over(report, report.metrics)

    def wait_until_written(self) -> None:
        """Wait for the thread that writes the last checkpoint."""
        with self._storing:
            pass

    def _hand_over(self, report: CheckpointReport, metrics: dict[str, float] | None) -> None:
        """Report a checkpoint to Ray, with the metrics of the epoch at whose end it was made."""
        facts: dict[str, Any] = {"epoch": report.epoch, "step": report.step}
        facts["config_hash"] = config_hash(report.config)
        if metrics is not None:
            # Ray Train and Ray Tune read metrics that are not nested.
            facts |= {"metrics": metrics, **metrics}
        checkpoint = store = None
        if self.is_first:
            started = time.perf_counter()
            self._storing.acquire()
            # Ray takes a folder now, and deletes it after `store` has filled and copied it.
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
            started, stored = time.perf_counter(), Checkpoint(f"{run_folder}/{name}", filesystem)
            is_local = filesystem.type_name == "local"
            folder = Path(stored.path if is_local else checkpoint.path)
            try:
                _require_shared(filesystem, run_folder)
                with space_required(run_folder if is_local else tempfile.gettempdir()):
                    folder.mkdir(exist_ok=True)
                    write = partial(snapshot.write, folder, self._files | {REPORTS_FILE: reports})
                    patiently(write, OSError)
                if not is_local:
                    patiently(lambda: _copy(folder, stored), OSError)
            except BaseException:
                with suppress(OSError):  # half a checkpoint would take space on a full device
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
    """Delete old temporary folders of workers that were killed: they would fill the device."""
    for folder in Path(tempfile.gettempdir()).glob(f"{UNSTORED}*"):
        with suppress(OSError):  # another worker may delete it, too
            if folder.stat().st_mtime < time.time() - UNSTORED_SECONDS:
                shutil.rmtree(folder)


def _require_shared(filesystem: pyarrow.fs.FileSystem, folder: str) -> None:
    """Check that this node sees the folder that the training controller has made for the run.

    Raises:
        StorageError: the folder is not there.
    """
    if filesystem.get_file_info(folder).type == pyarrow.fs.FileType.NotFound:
        raise StorageError(
            f"{folder}: not there on {socket.gethostname()}, so checkpoints would be lost; set "
            "storage.root to a folder that all nodes share, or to s3://BUCKET/PREFIX"
        )


def _copy(folder: Path, stored: Checkpoint) -> None:
    """Copy a checkpoint from a folder on this node to storage."""
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
    """Train in one process of the cluster.

    Args:
        settings: What `fit.run` passes on, and the way to the driver under `events`.

    Returns:
        On rank 0 `fps`, its `protocol` and the number of `epochs` trained; empty on others.
    """
    config = parse_config(settings["config"], "job")
    events, cache = settings["events"], settings["cache"]
    device = resources.worker_device()
    splits = same_on_all_nodes(lambda: load_splits(cache.localized(config)))
    remove_abandoned()
    teacher = settings["teacher"] and cache.local(settings["teacher"])
    shards, commit = settings["shards"], settings["commit"]
    conditions = find_conditions(splits, shards, teacher, device.type, commit)
    listener = WorkerListener(events, conditions)
    if listener.is_first:
        events.tell(WorkersStarted(worker_rank()[1], resources.node_count()))
    restored = _latest_whole_checkpoint(cache, listener.on_damage)
    changes = []
    if restored:
        name, accept = Path(settings["folder"]).name, settings["accept_changes"]
        changes = require_same_conditions(restored[0], conditions, name, accept_changes=accept)
    if listener.is_first:
        facts, findings = _describe(config, splits)
        events.tell(DataDescribed({} if changes else facts, findings))
        if changes and restored:
            tag = f"resumed.step-{read_about(restored[0]).step}"
            events.tell(TagsSet({tag: "; ".join(changes)}))
    if restored is None:
        weights = settings["weights"] and cache.local(settings["weights"])
        start = Start(weights, None, teacher, shards)
    else:
        listener.repeat(*restored)
        start = Start(None, restored[0], teacher, shards)
    options = FitOptions(
        device,
        Path(settings["folder"]) / "non_finite",
        start,
        settings["report_every"],
        settings["checkpoint_every"],
        _node_is_drained,
    )
    try:
        trainer = fit(config, splits, listener, options)
    except PreemptedError:
        _wait_until_stored()
        raise
    if not listener.is_first:
        return {}
    listener.wait_until_written()
    fps, protocol = measure_fps(trainer.model, splits[1], config, device)
    return {"fps": fps, "protocol": protocol, "epochs": trainer.epochs_done}


def _node_is_drained() -> bool:
    """Return whether a node of this training is about to go away, the same on all workers.

    All workers must call this together; it takes some milliseconds.
    """
    return ray.train.get_preemption_info() is not None


def _wait_until_stored() -> None:
    """Wait until Ray has noted the last checkpoint, from which training will continue."""
    committed = ray.train.CheckpointConsistencyMode.COMMITTED
    ray.train.get_all_reported_checkpoints(consistency_mode=committed, timeout_s=LEAVE_SECONDS)


def _describe(
    config: Config, splits: tuple[Split, Split]
) -> tuple[dict[str, str | int], list[str]]:
    """Return digests and sizes of the data, and what looks suspicious in it."""
    facts: dict[str, str | int] = {}
    for name, split in zip(("train", "val"), splits, strict=True):
        facts |= {f"{name}.digest": split.digest, f"{name}.images": len(split.records)}
    facts |= {f"train.dropped.{why}": count for why, count in splits[0].dropped.items()}
    findings = [str(finding) for finding in find_cheaply(config, *splits)]
    return facts, findings


def _latest_whole_checkpoint(
    cache: Cache, on_damage: Callable[[str], None]
) -> tuple[Path, str] | None:
    """Return the latest undamaged checkpoint: the folder of a copy on this node, and its location.

    All workers return the same checkpoint, or None if the training has none yet.

    Args:
        cache: This node's cache of files on S3.
        on_damage: Function that is called with the reason why a checkpoint is not used.

    Raises:
        StorageError: all checkpoints are damaged.
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
        on_damage(reason)
    raise StorageError(f"{reason}; there is no other: start anew under another run.name")


def _others_newest_first(latest: Checkpoint) -> list[Checkpoint]:
    """Return the other checkpoints that Ray keeps, the one with the most steps first."""
    reports = ray.train.get_all_reported_checkpoints()
    reports.sort(key=lambda report: report.metrics["step"], reverse=True)
    checkpoints = [report.checkpoint for report in reports]
    return [checkpoint for checkpoint in checkpoints if checkpoint.path != latest.path]
