"""Our checkpoints: folders that hold a model, facts about it, and the state of its training.

- weights.safetensors: the detector's state dict
- config.yaml: the resolved `Config`
- about.json: class names, category ids, step, epoch, metrics
- training.pt: optimizer and schedule, to go on from; not needed to predict
- sha256.json: checksums of all these, and of what else was written with them
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gfl.config import Config
from gfl.configfile import dump_config, parse_config
from gfl.detector import Detector
from gfl.pretrained import load_weights

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


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the host's memory: training goes on while it is written."""

    weights: dict[str, Tensor]
    config: Config
    about: About
    training: dict[str, Any]

    def write(self, folder: Path, more: Mapping[str, str] | None = None) -> None:
        """Write the checkpoint into the existing `folder`, the checksums last.

        Args:
            folder: Exists.
            more: Texts to keep in it besides, by file name.
        """
        # safetensors refuses the strides of `channels_last`.
        weights = {key: value.contiguous() for key, value in self.weights.items()}
        safetensors.torch.save_file(weights, folder / WEIGHTS)
        about = json.dumps(asdict(self.about), indent=1)
        texts = {CONFIG: dump_config(self.config), ABOUT: about, **(more or {})}
        for name, text in texts.items():
            (folder / name).write_text(text)
        torch.save(self.training, folder / TRAINING)
        sums = {name: _sha256(folder / name) for name in (WEIGHTS, TRAINING, *texts)}
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def take_snapshot(
    detector: Detector, config: Config, about: About, training: dict[str, Any]
) -> Snapshot:
    """Copy a detector and the state of its training; waits for the device."""
    return Snapshot(_copied(detector.state_dict()), config, about, _copied(training))


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def require_whole(folder: Path) -> None:
    """Check that a training can go on from a checkpoint: all that was written is there, unharmed.

    Raises:
        ValueError: a file that is missing or is not what was written, or no checksums.
    """
    for name, expected in _checksums(folder).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; use another checkpoint")
        _require_sum(folder / name, expected)


def _require_unharmed(folder: Path) -> None:
    """Check the files that are there: a model to predict with has no state of its training."""
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


def load_checkpoint(folder: Path, config: Config | None = None) -> tuple[Detector, About]:
    """Return the detector of a checkpoint, in evaluation mode, with what is known of it.

    Args:
        folder: The checkpoint.
        config: In place of the one it was trained with: other thresholds or image sizes, say.

    Raises:
        ValueError: a folder that is no checkpoint, a damaged one, a `config` of another model.
    """
    about = read_about(folder)
    trained = read_config(folder)
    _require_unharmed(folder)
    if config is not None and config.model != trained.model:
        raise ValueError(
            f"model.*: the model in {folder} cannot be changed after its training; "
            "override other sections"
        )
    if not len(about.classes) == len(about.category_ids) == trained.model.num_classes:
        raise ValueError(
            f"{folder / ABOUT}: names {len(about.classes)} classes, but the model has "
            f"{trained.model.num_classes}; restore the file"
        )
    detector = Detector(config or trained)
    load_weights(detector, folder / WEIGHTS)
    return detector.eval(), about


def read_config(folder: Path) -> Config:
    """Return the configuration that a checkpoint was trained with."""
    return parse_config(_read(folder / CONFIG), str(folder / CONFIG))


def read_about(folder: Path) -> About:
    """Return what a checkpoint says of its model."""
    try:
        return About(**json.loads(_read(folder / ABOUT)))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / ABOUT}: damaged ({error})") from error


def read_training(folder: Path) -> dict[str, Any]:
    """Return the state of optimizer and schedule in a checkpoint."""
    return torch.load(folder / TRAINING, map_location="cpu", weights_only=True)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        expected = ", ".join((WEIGHTS, CONFIG, ABOUT))
        raise ValueError(
            f"{path.parent}: not a checkpoint ({path.name}: {error.strerror}); expected a folder "
            f"with {expected}"
        ) from error
