"""The export job: which model, to which file."""

from pathlib import Path

from mnist.cli import InputError
from mnist.evaluation.job import find_weights, refuse_missing
from mnist.export.config import ExportConfig
from mnist.export.graph import onnx_bytes
from mnist.export.page import MAKER, draw_page
from mnist.model import load_model
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
    weights.say_unfinished("is exported")
    assert config.format is not None
    output = config.output or weights.home / "export" / _NAMES[config.format]
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
