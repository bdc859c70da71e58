"""The files of a checkpoint: a folder with a model, facts about it, and the state of its training.

- weights.safetensors: the detector's state dict
- config.yaml: the resolved `Config`
- about.json: class names, category ids, step, epoch, metrics
- training.pt: optimizer and schedule, needed to continue the training, not to predict
- sha256.json: checksums of these files and of all others that were written with them
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gfl.config.loader import parse_config
from gfl.config.schema import Config
from gfl.files import synchronise, write_atomically
from gfl.structures import Id

WEIGHTS = "weights.safetensors"
CONFIG = "config.yaml"
ABOUT = "about.json"
TRAINING = "training.pt"
CHECKSUMS = "sha256.json"


@dataclass(frozen=True)
class About:
    """Facts about the model of a checkpoint.

    Attributes:
        classes: Class names; the index is the label.
        category_ids: Id of every class in the annotations of the training set.
        step: Number of completed training steps.
        epoch: Number of completed epochs.
        metrics: Results of the latest evaluation.
    """

    classes: list[str]
    category_ids: list[Id]
    step: int
    epoch: int
    metrics: dict[str, float]


def read_config(folder: Path) -> Config:
    """Return the configuration that a checkpoint was trained with."""
    return parse_config(_read(folder / CONFIG), str(folder / CONFIG))


def read_about(folder: Path) -> About:
    """Return the facts about the model of a checkpoint."""
    try:
        return About(**json.loads(_read(folder / ABOUT)))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / ABOUT}: damaged ({error}); use another checkpoint") from error


def model_digest(folder: Path) -> str:
    """Return the SHA-256 of the files that determine a checkpoint's predictions."""
    sums = [_sha256(folder / name) for name in (WEIGHTS, CONFIG, ABOUT)]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of the named files in `folder`, which have reached the device then.

    So a checkpoint is whole after a power cut if it has its checksums.
    """
    sums = {name: _sha256(folder / name) for name in names}
    for name in sums:
        synchronise(folder / name)
    write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=1))
    synchronise(folder.parent)


def require_whole(folder: Path) -> None:
    """Check that a training can continue from a checkpoint: every file exists and is undamaged.

    Raises:
        ValueError: A file is missing or damaged, or there are no checksums.
    """
    for name, expected in _checksums(folder).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; use another checkpoint")
        _require_sum(folder / name, expected)


def require_unharmed(folder: Path) -> None:
    """Check that every file present is undamaged: a model to predict with needs no training state.

    Raises:
        ValueError: A file is damaged.
    """
    if (folder / CHECKSUMS).is_file():
        for name, expected in _checksums(folder).items():
            if (folder / name).is_file():
                _require_sum(folder / name, expected)


def _checksums(folder: Path) -> dict[str, str]:
    text = _read(folder / CHECKSUMS)
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CHECKSUMS}: damaged ({error}); use another checkpoint"
        ) from error


def _require_sum(path: Path, expected: str) -> None:
    if _sha256(path) != expected:
        raise ValueError(
            f"{path}: damaged (its SHA-256 is not the one in {CHECKSUMS}); use another checkpoint"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        expected = ", ".join((WEIGHTS, CONFIG, ABOUT))
        raise ValueError(
            f"{path.parent}: not a checkpoint ({path.name}: {error.strerror}); expected a folder "
            f"with {expected}"
        ) from error
