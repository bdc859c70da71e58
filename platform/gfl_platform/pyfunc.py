"""The registered model as MLflow runs it (models from code): paths of images in, detections out.

With MLflow's API alone:

    model = mlflow.pyfunc.load_model("models:/gfl-demo@champion")
    model.predict(["street.jpg"])
"""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel
from pydantic import BaseModel

from gfl.checkpoint import load_checkpoint
from gfl.predict import Predictor


class Detections(BaseModel):
    """The detections of one image, best first: boxes `xyxy` and edge_std in px."""

    boxes: list[list[float]]
    scores: list[float]
    classes: list[str]
    edge_std: list[list[float]]


class DetectorModel(PythonModel):
    """Detections of images given by their paths."""

    def load_context(self, context: Any) -> None:
        """Read the checkpoint that was logged with the model."""
        self._predictor = Predictor(*load_checkpoint(Path(context.artifacts["checkpoint"])))

    def predict(self, context: Any, model_input: list[str]) -> list[Detections]:
        """Return the detections in every image file."""
        classes = self._predictor.about.classes
        return [
            Detections(
                boxes=found.boxes.tolist(),
                scores=found.scores.tolist(),
                classes=[classes[label] for label in found.labels.tolist()],
                edge_std=found.edge_std.tolist(),
            )
            for found in (self._predictor.predict(Path(path)) for path in model_input)
        ]


mlflow.models.set_model(DetectorModel())
