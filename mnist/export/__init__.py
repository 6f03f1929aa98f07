"""The export: a model that leaves this package, as an ONNX file or as a page to draw on."""
