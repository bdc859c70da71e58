"""The registered model as MLflow runs it (models from code): images in, detections out.

In a process, with MLflow's API alone:

    model = mlflow.pyfunc.load_model("models:/gfl-demo@champion")
    model.predict(["street.jpg"])

Over HTTP, `mlflow models serve` takes {"inputs": ["<base64 of an image file>"]}. A server does not
read paths, because they would name files of its own machine, unless GFL_SERVE_PATHS is 1.
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
"""Variable that MLflow sets in the environment of its scoring server, and nowhere else."""

LONGEST_PATH = 4096
"""Characters of the longest path that Linux opens; a longer text is meant as base64."""


def _is_useful(record: logging.LogRecord) -> bool:
    """Return whether MLflow logs something else than that the model checks its own input."""
    return "is inferred as AnyType" not in record.getMessage()


logging.getLogger("mlflow.types.type_hints").addFilter(_is_useful)


class Detections(BaseModel):
    """The detections in one image, best first; boxes are `xyxy` in px, like `edge_std`."""

    boxes: list[list[float]]
    scores: list[float]
    classes: list[str]
    edge_std: list[list[float]]


class InputError(MlflowException):
    """An input that is not an image; a server answers with status 400."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """The reason alone, because MLflow's server would put the whole request before it."""
        return self._reason

    @message.setter
    def message(self, _: str) -> None:
        pass


class DetectorModel(PythonModel):
    """Detects objects in images: bytes or base64 of an image file, a data URL, or a path."""

    def load_context(self, context: Any) -> None:
        """Read the checkpoint that was logged with the model."""
        self._model = gfl.load(context.artifacts["checkpoint"])

    def predict(self, context: Any, model_input: list[bytes | str]) -> list[Detections]:
        """Return the detections in every image.

        Raises:
            InputError: an input is not an image, or there are no inputs.
        """
        if len(model_input) == 0:
            raise InputError("inputs: empty; expected a list of images")
        images = [_content(image, number) for number, image in enumerate(model_input)]
        return [self._detect(image, number) for number, image in enumerate(images)]

    def _detect(self, image: bytes | Path, number: int) -> Detections:
        try:
            (detections,) = self._model.predict(image)
        except (ValueError, OSError) as error:
            raise InputError(f"image {number}: {error}") from error
        return Detections(
            boxes=detections.boxes.tolist(),
            scores=detections.scores.tolist(),
            classes=detections.names,
            edge_std=detections.edge_std.tolist(),
        )


def _content(image: Any, number: int) -> bytes | Path:
    """Return the content of image file `number` of a request, or its path.

    Raises:
        InputError: neither bytes, base64, a data URL nor a path that may be read.
    """
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        kind = "an empty string" if image == "" else type(image).__name__
        raise InputError(f"image {number}: got {kind}; expected base64 or bytes of an image file")
    text = image.partition(";base64,")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        if len(image) > LONGEST_PATH or image.startswith("data:"):
            raise InputError(f"image {number}: damaged base64 ({error})") from error
    if SERVED in os.environ and os.environ.get("GFL_SERVE_PATHS") != "1":
        raise InputError(f"image {number}: is not base64; paths are not read by a server")
    return Path(image)


mlflow.models.set_model(DetectorModel())
