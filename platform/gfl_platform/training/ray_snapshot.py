"""Ray's list of a run's checkpoints, rebuilt from the checkpoints where the list is damaged.

Ray 2.60 writes the list after every report, in place and without synchronising it, and ends a run
whose list is empty or names a folder that is gone. The file's keys are Ray's own; a test lets Ray
read what is written here.
"""

import json
import logging
from math import inf, isnan
from pathlib import Path
from typing import Any

import ray

from gfl.checkpoint.files import read_about, read_config, require_whole
from gfl.config.loader import config_hash
from gfl.files import write_atomically
from gfl_platform.cluster.events import EpochEvaluated, from_json
from gfl_platform.storage.files import StorageError
from gfl_platform.storage.s3 import download, list_objects, upload
from gfl_platform.storage.storage import Storage, is_there
from gfl_platform.training.worker import REPORTS_FILE

logger = logging.getLogger(__name__)

SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray's list, in the folder of the run's checkpoints."""


def mend_snapshot(storage: Storage, folder: Path) -> None:
    """Rebuild Ray's list of the checkpoints in `folder` if Ray could not read it.

    Raises:
        StorageError: the list is damaged, and none of the checkpoints is whole.
    """
    location, path = storage.location_of(folder), folder / SNAPSHOT_FILE
    if not is_there(location):
        return
    if storage.is_remote:
        path.unlink(missing_ok=True)
        if list_objects(f"{location}/{SNAPSHOT_FILE}"):
            folder.mkdir(parents=True, exist_ok=True)
            download(f"{location}/{SNAPSHOT_FILE}", path)
    found = {name for name in storage.folders_in(folder) if name.startswith("checkpoint_")}
    problem = _problem(path, found)
    if not problem:
        return
    whole = []
    for name in sorted(found):
        try:
            whole.append(_result(name, storage.cache.local(f"{location}/{name}")))
        except ValueError as error:
            logger.info("%s is not used: %s", name, error)
    if not whole:
        if path.is_file():
            raise StorageError(
                f"{location}/{SNAPSHOT_FILE}: {problem}, and none of {len(found)} checkpoints "
                "beside it is whole; restore the folder from a backup, or start anew under another "
                "run.name"
            )
        return  # The run was ended before its first checkpoint was stored.
    logger.warning(
        "warning: %s/%s: %s; it is rebuilt from the checkpoints that are whole: %s",
        location, SNAPSHOT_FILE, problem, ", ".join(each["checkpoint_dir_name"] for each in whole),
    )  # fmt: skip
    write_atomically(path, _snapshot_of(whole))
    if storage.is_remote:
        upload(path, f"{location}/{SNAPSHOT_FILE}")


def _problem(path: Path, found: set[str]) -> str:
    """Return why Ray cannot use its list, beside the checkpoints `found`; empty if it can."""
    if not path.is_file():
        return "not there" if found else ""
    try:
        state = json.loads(path.read_bytes())
        names = [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]
        latest = state["latest_checkpoint_result"]
        latest_names = [latest["checkpoint_dir_name"]] if latest else []
        counts = len(state["checkpoint_report_indices"]), int(state["current_report_index"])
    except (ValueError, LookupError, TypeError) as error:
        return f"damaged ({type(error).__name__}: {error})"
    if counts[0] != len(names) or not set(latest_names) <= set(names):
        return "damaged (its lists do not fit together)"
    gone = sorted(set(names) - found)
    return f"names {', '.join(gone)}, which is not there" if gone else ""


def _result(name: str, folder: Path) -> dict[str, Any]:
    """Return what Ray notes of a checkpoint: the metrics that the worker reported with it.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    require_whole(folder)
    about = read_about(folder)
    facts: dict[str, Any] = {"epoch": about.epoch, "step": about.step}
    facts["config_hash"] = config_hash(read_config(folder))
    for record in json.loads((folder / REPORTS_FILE).read_text()):
        event = from_json(record)
        if isinstance(event, EpochEvaluated) and event.step == about.step:
            facts |= {"metrics": event.metrics, **event.metrics}
    return {"version": 0, "checkpoint_dir_name": name, "metrics": facts}


def _snapshot_of(results: list[dict[str, Any]]) -> str:
    """Return the content of Ray's list; its order is that of the AP, its indices that of steps."""

    def score(result: dict[str, Any]) -> float:
        ap = result["metrics"].get("AP", -inf)
        return -inf if isnan(ap) else ap

    results.sort(key=lambda result: (result["metrics"]["step"], result["checkpoint_dir_name"]))
    latest, indices = results[-1], range(len(results))
    by_score = sorted(indices, key=lambda index: (score(results[index]), index))
    lists = ("pending_training_results", "pending_validation_specs",
             "validated_checkpoint_dir_names", "timed_out_validation_checkpoint_dir_names",
             "failed_validation_checkpoint_dir_names")  # fmt: skip
    return json.dumps(
        {
            "ray_version": ray.__version__,
            "checkpoint_results": [results[index] for index in by_score],
            "checkpoint_report_indices": by_score,
            "latest_checkpoint_result": latest,
            "current_report_index": len(results),
            **{name: [] for name in lists},
        }
    )
