"""Writing checkpoints, and reading them as a detector and the state of its training."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gfl.checkpoint.files import (
    ABOUT,
    CONFIG,
    TRAINING,
    WEIGHTS,
    About,
    read_about,
    read_config,
    require_unharmed,
    write_checksums,
)
from gfl.checkpoint.pretrained import load_weights
from gfl.config.loader import dump_config
from gfl.config.schema import Config
from gfl.model.detector import Detector


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the host's memory, so that training continues while it is written.

    Attributes:
        weights: State dict of the detector.
        config: Configuration of the training.
        about: Facts about the model.
        training: State of optimizer and schedule.
    """

    weights: dict[str, Tensor]
    config: Config
    about: About
    training: dict[str, Any]

    def write(self, folder: Path, more: Mapping[str, str] | None = None) -> None:
        """Write the checkpoint into the existing `folder`, the checksums last.

        Args:
            folder: An existing folder.
            more: Texts to write with the checkpoint, by file name.
        """
        # safetensors refuses the strides of `channels_last`.
        weights = {key: value.contiguous() for key, value in self.weights.items()}
        safetensors.torch.save_file(weights, folder / WEIGHTS)
        about = json.dumps(asdict(self.about), indent=1)
        texts = {CONFIG: dump_config(self.config), ABOUT: about, **(more or {})}
        for name, text in texts.items():
            (folder / name).write_text(text)
        with (folder / TRAINING).open("wb") as file:  # torch hides the reason if it opens the file
            torch.save(self.training, file)
        write_checksums(folder, (WEIGHTS, TRAINING, *texts))


def take_snapshot(
    detector: Detector, config: Config, about: About, training: dict[str, Any]
) -> Snapshot:
    """Copy a detector and the state of its training into the host's memory (blocks)."""
    return Snapshot(_copied(detector.state_dict()), config, about, _copied(training))


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def load_checkpoint(folder: Path, config: Config | None = None) -> tuple[Detector, About]:
    """Return the detector of a checkpoint, in evaluation mode, and the facts about it.

    Args:
        folder: The checkpoint.
        config: Replaces the configuration of its training, for example by other thresholds.

    Raises:
        ValueError: The folder is no checkpoint, is damaged, or has another model than `config`.
    """
    about = read_about(folder)
    trained = read_config(folder)
    require_unharmed(folder)
    if config is not None and config.model != trained.model:
        raise ValueError(
            f"model.*: the model in {folder} cannot be changed after its training; "
            "override other sections"
        )
    if not len(about.classes) == len(about.category_ids) == trained.model.num_classes:
        raise ValueError(
            f"{folder / ABOUT}: has {len(about.classes)} classes and {len(about.category_ids)} "
            f"category ids, but the model has {trained.model.num_classes} classes; restore the file"
        )
    detector = Detector(config or trained)
    load_weights(detector, folder / WEIGHTS)
    return detector.eval(), about


def read_training(folder: Path) -> dict[str, Any]:
    """Return the state of optimizer and schedule in a checkpoint."""
    return torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
