"""Our checkpoints: folders that hold a model, facts about it, and the state of its training.

- weights.safetensors: the detector's state dict
- config.yaml: the resolved `Config`
- about.json: class names, category ids, step, epoch, metrics
- training.pt: optimizer and schedule, to go on from; not needed to predict
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from gfl.config import Config
from gfl.configfile import dump_config, parse_config
from gfl.detector import Detector
from gfl.pretrained import load_weights

WEIGHTS = "weights.safetensors"
CONFIG = "config.yaml"
ABOUT = "about.json"
TRAINING = "training.pt"


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


def save_checkpoint(
    folder: Path, detector: Detector, config: Config, about: About, training: dict[str, Any]
) -> None:
    """Write a checkpoint into the existing `folder`."""
    # safetensors refuses the strides of `channels_last`.
    state = {key: value.contiguous() for key, value in detector.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(dump_config(config))
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=1))
    torch.save(training, folder / TRAINING)


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
