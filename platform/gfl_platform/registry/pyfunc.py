"""The registered model as MLflow runs it (models from code): images in, detections out.

In a process, with MLflow's API alone:

    model = mlflow.pyfunc.load_model("models:/gfl-demo@champion")
    model.predict(["street.jpg"])

Over HTTP, from `mlflow models serve`: {"inputs": ["<base64 of an image file>"]}. A server reads no
paths, which would be those of its own machine, unless GFL_SERVE_PATHS=1 allows it.
"""

import base64
import binascii
import logging
import os
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from pydantic import BaseModel

import gfl

SERVED = "__pyfunc_model_path__"
"""In the environment of MLflow's scoring server, and of nothing else."""

LONGEST_PATH = 4096


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether MLflow says more than that it leaves it to us to check an input."""
    return "is inferred as AnyType" not in record.getMessage()


logging.getLogger("mlflow.types.type_hints").addFilter(_is_news)


class Detections(BaseModel):
    """The detections of one image, best first: boxes `xyxy` and edge_std in px."""

    boxes: list[list[float]]
    scores: list[float]
    classes: list[str]
    edge_std: list[list[float]]


class InputError(MlflowException):
    """An input that is no image; an answer of status 400."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """The reason alone: MLflow's server would put the whole request before it."""
        return self._reason

    @message.setter
    def message(self, _: str) -> None:
        pass


class DetectorModel(PythonModel):
    """Detections in images, each a file's content as bytes or base64, a data URL, or a path."""

    def load_context(self, context: Any) -> None:
        """Read the checkpoint that was logged with the model."""
        self._model = gfl.load(context.artifacts["checkpoint"])

    def predict(self, context: Any, model_input: list[bytes | str]) -> list[Detections]:
        """Return the detections in every image.

        Raises:
            InputError: one of them is no image, or there is none.
        """
        if len(model_input) == 0:
            raise InputError("inputs: empty; expected a list of images")
        images = [_content(image, number) for number, image in enumerate(model_input)]
        answers = []
        for number, image in enumerate(images):
            try:
                (found,) = self._model.predict(image)
            except (ValueError, OSError) as error:
                raise InputError(f"image {number}: {error}") from error
            answers.append(
                Detections(
                    boxes=found.boxes.tolist(),
                    scores=found.scores.tolist(),
                    classes=found.names,
                    edge_std=found.edge_std.tolist(),
                )
            )
        return answers


def _content(image: Any, number: int) -> bytes | Path:
    """Return the content of an image file, or its path."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        given = "an empty string" if image == "" else type(image).__name__
        raise InputError(f"image {number}: got {given}; expected base64 or bytes of an image file")
    text = image.partition(";base64,")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        if len(image) > LONGEST_PATH or image.startswith("data:"):
            raise InputError(f"image {number}: damaged base64 ({error})") from error
    if SERVED in os.environ and os.environ.get("GFL_SERVE_PATHS") != "1":
        raise InputError(f"image {number}: is no base64; paths are not read by a server")
    return Path(image)


mlflow.models.set_model(DetectorModel())
