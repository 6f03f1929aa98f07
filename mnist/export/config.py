"""Settings of an export, and how a command line makes them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mnist.cli import InputError, as_typed, parse_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained model as a file that needs nothing of this package."""

    run: Path | None = None
    """Run folder: its final model or, of an unfinished run, its newest good checkpoint."""
    model: Path | None = None
    """Model file (.safetensors), instead of --run."""
    format: Literal["onnx", "html"] | None = None
    """onnx: from Nx28x28 pixels, light ink on 0, to Nx10 probabilities, for ONNX Runtime and
    others; html: a page to draw digits on, which works without a server."""
    input: Literal["bytes", "float"] = "bytes"
    """Pixels that an ONNX file takes: bytes of 0 to 255, or floats of 0 to 1."""
    output: Path | None = None
    """The file to write; by default export/model.onnx or export/draw.html beside the model."""

    def check(self) -> None:
        """Raise an InputError if the options do not say, once, what is to be written."""
        if (self.run is None) == (self.model is None):
            raise InputError("give one of --run FOLDER or --model FILE")
        if self.format is None:
            raise InputError("give --format onnx or --format html")
        if self.format == "html" and self.input != "bytes":
            raise InputError("--input takes --format onnx; a page draws its own pixels")


def parse_export_config(arguments: Sequence[str]) -> ExportConfig:
    """Settings of an export from the command line.

    Raises:
        InputError: an unknown option, a wrong type, or a contradiction.
    """
    config = parse_options(as_typed(arguments, ExportConfig), ExportConfig(), "export")
    config.check()
    return config
