"""What the numbers of a training depend on besides its configuration.

Every checkpoint has these conditions in a file, and a training that continues from it compares them
with those that it finds: other data, other code or another number of shards would make another
model without a word.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import gfl
from gfl.checkpoint.files import WEIGHTS
from gfl.data.split import Split
from gfl_platform.cluster.preflight import code_digest
from gfl_platform.provenance import COMMIT
from gfl_platform.storage.files import read_json

CONDITIONS_FILE = "conditions.json"
"""File in a checkpoint with the conditions of its training."""

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "hotcoco")
"""Packages that compute the numbers: layers, draws, pixels and AP."""


class ChangedError(ValueError):
    """A run that would not go on with the numbers of an uninterrupted one."""


def find_conditions(
    splits: tuple[Split, Split], shards: int, teacher: Path | None, device: str, commit: str
) -> dict[str, str]:
    """Return the conditions of a training on this node, by name.

    Where the data lies is none of them: a dataset that moved has the same digest.

    Args:
        splits: The images to train on, and those to evaluate on.
        shards: Number of shards of a global batch.
        teacher: Folder of the checkpoint that `loss.distillation` learns from.
        device: Type of the devices.
        commit: The commit of the code.
    """
    train, conditions = splits[0], {}
    for part, split in zip(("train", "val"), splits, strict=True):
        conditions[f"data.{part}"] = f"{len(split.records)} images ({split.digest[:12]})"
    for label, (id_, name) in enumerate(zip(train.category_ids, train.classes, strict=True)):
        conditions[f"class {label}"] = f"{name} (category {id_})"
    if teacher is not None:
        with (teacher / WEIGHTS).open("rb") as file:
            conditions["teacher"] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    conditions |= {"workers (shards)": str(shards), "device": device}
    conditions |= {package: version(package) for package in PACKAGES}
    return {**conditions, "code of gfl": code_digest(gfl)[:12], COMMIT: commit[:12]}


def require_same_conditions(
    checkpoint: Path, now: Mapping[str, str], run: str, *, accept_changes: bool
) -> list[str]:
    """Return how the conditions of a checkpoint's training differ from those of now.

    A commit may change what makes no number. So it is told only beside another difference.

    Args:
        checkpoint: Folder of the checkpoint.
        now: The conditions of now.
        run: Name of the run.
        accept_changes: Whether they may differ.

    Raises:
        ChangedError: they differ, and may not.
    """
    before = read_json(checkpoint / CONDITIONS_FILE)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names == [COMMIT]:
        return []
    changes = [f"{name}: {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in names]
    if changes and not accept_changes:
        raise ChangedError(
            f"run '{run}' would not go on with the same numbers ({'; '.join(changes)}); undo these "
            "changes, start another run, or go on all the same with --accept-changes "
            "(run.accept_changes=true)"
        )
    return changes
