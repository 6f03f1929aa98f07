"""docs/tour.ipynb, run from top to bottom; run as a program, this stores its outputs."""

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"

pytestmark = pytest.mark.skipif(not NOTEBOOK.exists(), reason="no docs here: the image has none")


def executed(place: Path, data_dir: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, as run in a folder that looks like a clone."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place / "docs").mkdir()
    (place / "scripts").symlink_to(ROOT / "scripts")
    (place / "data").symlink_to(data_dir)
    client = nbclient.NotebookClient(
        notebook,
        timeout=100,
        kernel_name="python3",  # of this environment
        resources={"metadata": {"path": place / "docs"}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # the same once more, by Pillow
    return notebook


def text_of(cell: nbformat.NotebookNode) -> str:
    shown = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "".join(shown)


def cells_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def tour(data_dir, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # the kernel sets it
        patch.setenv("MNIST_DATA_DIR", str(data_dir))
        return executed(tmp_path_factory.mktemp("tour"), data_dir)


def test_every_cell_runs(tour):
    cells = cells_of(tour)
    assert len(cells) == 10 and all(cell.outputs for cell in cells)
    names = {output.get("name") for cell in cells for output in cell.outputs}
    assert names <= {"stdout", None}  # nothing on standard error
    trained, curves, grid, evaluated, exported, loaded, found, mistakes, bars, own = cells
    accuracy = float(re.search(r"test +accuracy ([\d.]+)%", text_of(trained))[1])
    assert accuracy > 98.0
    assert "\r " not in text_of(trained) + text_of(evaluated)  # bars would be kept in every state
    assert re.search(r"result +accuracy \d\d\.\d\d%", text_of(evaluated))
    assert "draw.html" in text_of(exported) and "784-512-256-128-64-10" in text_of(loaded)
    assert "10,000 predictions: 7, 2, 1, 0, 4" in text_of(found)
    assert text_of(own) == "<1 predictions: 7>"
    for cell in (curves, grid, found, mistakes, bars, own):
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_what_is_stored_is_what_runs(tour):
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    assert NOTEBOOK.stat().st_size < 300_000
    kinds = [[o.output_type for o in cell.outputs] for cell in cells_of(stored)]
    assert kinds == [[o.output_type for o in cell.outputs] for cell in cells_of(tour)]
    assert [cell.execution_count for cell in cells_of(stored)] == list(range(1, 11))
    said = json.dumps([text_of(cell) for cell in cells_of(stored)])
    assert not re.search(r"/(home|root|tmp|work|usr)/", said)
    assert max(len(cell.source.splitlines()) for cell in cells_of(stored)) <= 6


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)
    data = Path(os.environ.get("MNIST_DATA_DIR", ROOT / "data")).resolve()
    os.environ["MNIST_DATA_DIR"] = str(data)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        nbformat.write(executed(Path(folder), data), NOTEBOOK)
        print(f"{NOTEBOOK}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
