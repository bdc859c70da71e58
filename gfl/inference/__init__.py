"""The model in use: prediction, detections and their writers, pictures."""
