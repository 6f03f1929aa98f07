"""The page to try a model on: one HTML file that draws, normalises and predicts by itself.

``draw.html`` beside this module is its template, ``normaliser.js`` the arithmetic of
``mnist.normaliser``, ``draw.js`` all else.
"""

import base64
from pathlib import Path

from mnist.data import MEAN, STD
from mnist.evaluation.page import render
from mnist.model import CLASSES, MLP

MAKER = "mnist-ocr export"
"""In what an export writes, by which it knows its own."""

_DOUBTFUL = 0.9  # the confidence below which a model without a threshold is called in doubt


def draw_page(model: MLP, name: str, sha256: str) -> str:
    """The whole page.

    Args:
        model: in float32, on the CPU.
        name: what to call it.
        sha256: of its file.
    """
    folder = Path(__file__).parent
    contents = b"".join(
        tensor.detach().numpy().astype("<f4").tobytes()
        for layer in model.layers
        for tensor in (layer.weight, layer.bias)
    )
    return render(
        folder / "draw.html",
        {},
        maker=MAKER,
        name=name,
        sha256=sha256,
        own_threshold=model.doubt is not None,
        settings={
            "sizes": [model.layers[0].in_features, *model.hidden_sizes, CLASSES],
            "mean": MEAN,
            "std": STD,
            "temperature": model.doubt.temperature if model.doubt else 1,
            "threshold": model.doubt.threshold if model.doubt else _DOUBTFUL,
        },
        scripts=[(folder / script).read_text() for script in ("normaliser.js", "draw.js")],
        weights=base64.b64encode(contents).decode(),
    )
