"""The detector as torch.export, ONNX and int8 files, each checked against the model."""
