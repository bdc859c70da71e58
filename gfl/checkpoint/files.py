"""The files of a checkpoint: a folder with a model, facts about it, and the state of its training.

- weights.safetensors: the detector's state dict
- config.yaml: the resolved `Config`
- about.json: class names, category ids, step, epoch, metrics
- training.pt: optimizer and schedule, to go on from; not needed to predict
- sha256.json: checksums of all these, and of what else was written with them
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gfl.config.loader import parse_config
from gfl.config.schema import Config

WEIGHTS = "weights.safetensors"
CONFIG = "config.yaml"
ABOUT = "about.json"
TRAINING = "training.pt"
CHECKSUMS = "sha256.json"


@dataclass(frozen=True)
class About:
    """What a checkpoint says of its model.

    Attributes:
        classes: Class names; the index is the label.
        category_ids: The id of every class in the annotations it was trained on.
        step: Training steps done.
        epoch: Epochs done.
        metrics: What the last evaluation measured.
    """

    classes: list[str]
    category_ids: list[int]
    step: int
    epoch: int
    metrics: dict[str, float]


def read_config(folder: Path) -> Config:
    """Return the configuration that a checkpoint was trained with."""
    return parse_config(_read(folder / CONFIG), str(folder / CONFIG))


def read_about(folder: Path) -> About:
    """Return what a checkpoint says of its model."""
    try:
        return About(**json.loads(_read(folder / ABOUT)))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / ABOUT}: damaged ({error})") from error


def require_whole(folder: Path) -> None:
    """Check that a training can go on from a checkpoint: all that was written is there, unharmed.

    Raises:
        ValueError: a file that is missing or is not what was written, or no checksums.
    """
    for name, expected in _checksums(folder).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; use another checkpoint")
        _require_sum(folder / name, expected)


def require_unharmed(folder: Path) -> None:
    """Check the files that are there: a model to predict with has no state of its training.

    Raises:
        ValueError: a file that is not what was written.
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


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write down what the files of these names are now."""
    sums = {name: _sha256(folder / name) for name in names}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


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
