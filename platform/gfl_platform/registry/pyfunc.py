"""The registered model as MLflow runs it (models from code): images in, detections out.

In a process, with MLflow's API alone:

    model = mlflow.pyfunc.load_model("models:/gfl-demo@champion")
    model.predict([Path("street.jpg").read_bytes()])

Over HTTP, `mlflow models serve` takes {"inputs": ["<base64 of an image file>"]}. Paths would name
files of the server's machine, so they are read only where the variable GFL_SERVE_PATHS is 1.
"""

import base64
import binascii
import logging
import os
import threading
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from pydantic import BaseModel

import gfl
from gfl.data.images import image_size

logger = logging.getLogger(__name__)

MOST_IMAGES = 64
"""Largest number of images in a request."""

LARGEST_FILE = 32 * 2**20
"""Largest size in bytes of an image file."""

LARGEST_REQUEST = 64 * 2**20
"""Largest size in bytes of all images in a request, as they are sent."""

LARGEST_IMAGE = 50_000_000
"""Largest number of pixels in an image."""

LONGEST_PATH = 4096
"""Characters of the longest path that Linux opens."""


def _is_useful(record: logging.LogRecord) -> bool:
    """Return whether MLflow logs something else than that the model checks its own input."""
    return "is inferred as AnyType" not in record.getMessage()


logging.getLogger("mlflow.types.type_hints").addFilter(_is_useful)


class Detections(BaseModel):
    """The detections in one image, best first; boxes are `xyxy` in px, like `edge_std`.

    `error` says why an image has none; it is None for an image that was read.
    """

    boxes: list[list[float]] = []
    scores: list[float] = []
    classes: list[str] = []
    edge_std: list[list[float]] = []
    error: str | None = None


class InputError(MlflowException):
    """A request that is not a list of images; a server answers with status 400."""

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
        # Requests run in threads of their own; one decoded image at a time bounds the memory.
        self._one_at_a_time = threading.Lock()

    def predict(self, context: Any, model_input: list[bytes | str]) -> list[Detections]:
        """Return the detections in every image, or the reason why it cannot be read.

        Raises:
            InputError: there are no images, or more than a request may have.
        """
        if not 1 <= len(model_input) <= MOST_IMAGES:
            raise InputError(
                f"inputs: got {len(model_input)} images; expected 1 to {MOST_IMAGES} in a request"
            )
        size = sum(len(image) for image in model_input if isinstance(image, bytes | str))
        if size > LARGEST_REQUEST:
            raise InputError(
                f"inputs: got {size:,} bytes; expected at most {LARGEST_REQUEST:,} in a request; "
                "send fewer images in each"
            )
        return [self._detect(image, number) for number, image in enumerate(model_input)]

    def _detect(self, image: Any, number: int) -> Detections:
        try:
            content = _content(image, number)
            with self._one_at_a_time:
                _require_pixels(content, number)
                (detections,) = self._model.predict(content)
        except InputError as error:
            return Detections(error=error.message)
        except (ValueError, OSError) as error:
            return Detections(error=f"image {number}: {error}")
        except (RuntimeError, MemoryError) as error:
            logger.exception("image %d of a request", number)
            return Detections(error=f"image {number}: the detector failed ({error})"[:500])
        return Detections(
            boxes=detections.boxes.tolist(),
            scores=detections.scores.tolist(),
            classes=detections.names,
            edge_std=detections.edge_std.tolist(),
        )


def _content(image: Any, number: int) -> bytes:
    """Return the content of image file `number` of a request.

    Raises:
        InputError: neither bytes, base64, a data URL nor a path that may be read, or too large.
    """
    if not isinstance(image, bytes | str) or not image:
        kind = f"an empty {type(image).__name__}" if image in ("", b"") else type(image).__name__
        raise InputError(f"image {number}: got {kind}; expected base64 or bytes of an image file")
    if isinstance(image, str) and len(image) <= LONGEST_PATH and _reads_paths():
        path = Path(image)
        if path.is_file():
            _require_bytes(path.stat().st_size, number)
            return path.read_bytes()
    if isinstance(image, str):
        _require_bytes(len(image) * 3 // 4, number)
        image = _decoded(image, number)
    _require_bytes(len(image), number)
    return image


def _decoded(image: str, number: int) -> bytes:
    """Return the content of base64 or a data URL; white space in it does not count (RFC 2045)."""
    text = image.partition(";base64,")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        expected = "base64 of an image file"
        if len(image) <= LONGEST_PATH:
            expected += (
                ", or the path of a file that is there"
                if _reads_paths()
                else "; a path is read only where the server has GFL_SERVE_PATHS=1"
            )
        raise InputError(
            f"image {number}: is not base64 ({error}): got {image[:40]!r}; expected {expected}"
        ) from error


def _reads_paths() -> bool:
    return os.environ.get("GFL_SERVE_PATHS") == "1"


def _require_bytes(size: int, number: int) -> None:
    if size > LARGEST_FILE:
        raise InputError(
            f"image {number}: has {size:,} bytes; expected at most {LARGEST_FILE:,}; "
            "send a smaller file"
        )


def _require_pixels(content: bytes, number: int) -> None:
    """Check the size in an image's header, before its pixels take memory."""
    height, width = image_size(content)
    if height * width > LARGEST_IMAGE:
        raise InputError(
            f"image {number}: has {width} x {height} px; expected at most {LARGEST_IMAGE:,} px; "
            "scale it down"
        )


mlflow.models.set_model(DetectorModel())
