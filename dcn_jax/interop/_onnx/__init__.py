"""Models taken to ONNX, in files by kind of what they convert."""
