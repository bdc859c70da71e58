"""The registered model as MLflow runs it (models from code): paths of images in, detections out.

With MLflow's API alone:

    model = mlflow.pyfunc.load_model("models:/gfl-demo@champion")
    model.predict(["street.jpg"])
"""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel

from gfl.checkpoint import load_checkpoint
from gfl.predict import Predictor


class DetectorModel(PythonModel):
    """Detections of images given by their paths."""

    def load_context(self, context: Any) -> None:
        """Read the checkpoint that was logged with the model."""
        self._predictor = Predictor(*load_checkpoint(Path(context.artifacts["checkpoint"])))

    def predict(self, context: Any, model_input: list[str]) -> list[dict[str, Any]]:
        """Return every image's boxes (`xyxy` in px), scores, class names and edge_std (px)."""
        results = []
        for path in model_input:
            found = self._predictor.predict(Path(path))
            results.append(
                {
                    "boxes": found.boxes.tolist(),
                    "scores": found.scores.tolist(),
                    "classes": [self._predictor.about.classes[label] for label in found.labels],
                    "edge_std": found.edge_std.tolist(),
                }
            )
        return results


mlflow.models.set_model(DetectorModel())
