"""The export job: which model, to which file."""

from pathlib import Path

from mnist.cli import InputError
from mnist.evaluation.job import Weights, find_weights, refuse_missing
from mnist.export.config import ExportConfig
from mnist.export.graph import onnx_bytes
from mnist.export.page import MAKER, draw_page
from mnist.model import load_model
from mnist.runs.checkpoint import enclosing_checkpoint
from mnist.system import sha256, write_file

_NAMES = {"onnx": "model.onnx", "html": "draw.html"}


def export(config: ExportConfig) -> None:
    """Write the file, and say what it is.

    Raises:
        InputError: there is no such model, the file cannot be written or is somebody else's, or a
            package is missing.
    """
    refuse_missing(config)
    weights = find_weights(config)
    model = load_model(weights.path)
    if weights.run is not None and weights.step is not None:
        print(f"{weights.run} is not finished: its checkpoint of step {weights.step:,} is exported")
    assert config.format is not None
    output = config.output or _folder(weights) / "export" / _NAMES[config.format]
    _refuse_foreign(output)
    if config.format == "onnx":
        contents, difference = onnx_bytes(model, floats=config.input == "float")
        what = f"probabilities differ by {difference:.0e} at most from the model's (100 images)"
    else:
        name = (weights.run or weights.path).resolve().name
        contents = draw_page(model, name, sha256(weights.path)).encode()
        what = "open it in a browser, on a desktop or a phone"
    try:
        if config.output is None:
            output.parent.mkdir(exist_ok=True)
        write_file(output, contents)
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}; nothing was changed") from None
    print(f"wrote       {output}, {len(contents) / 1e6:.1f} MB: {what}")


def _folder(weights: Weights) -> Path:
    """Of the run, or else of the model's file; nothing is written into a checkpoint."""
    inside = enclosing_checkpoint(weights.path)
    if weights.run is None and inside is not None:
        return inside.parents[1]
    return weights.run or weights.path.parent


def _refuse_foreign(output: Path) -> None:
    """Raise an InputError if the place is taken by what no export has made."""
    try:
        with output.open("rb") as file:
            start = file.read(1024)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}; --output takes the name of a file") from None
    if MAKER.encode() not in start:
        raise InputError(f"{output} is no export of this package, and stays as it is; name another")
