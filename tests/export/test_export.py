"""The exports: an ONNX file and a page beside the model in Python, and refusals."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import mnist
from mnist.cli import InputError
from mnist.data import load_mnist
from mnist.export.config import parse_export_config
from mnist.export.job import export
from mnist.export.page import draw_page
from mnist.model import MLP, load_model, save_model
from mnist.normaliser import normalise_digits


def run(*options):
    export(parse_export_config([*map(str, options)]))


@pytest.fixture(scope="module")
def doubtful(with_doubt):
    return with_doubt(temperature=1.7, threshold=0.5)


# ---------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("kind", ["bytes", "float"])
def test_onnx_says_what_the_model_says(doubtful, kind, data_dir, tmp_path):
    path = tmp_path / "model.onnx"
    run("--model", doubtful, "--format", "onnx", "--input", kind, "--output", path)
    images = load_mnist(data_dir, "test").images[:1000].numpy()
    given = images if kind == "bytes" else (images / 255).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": given})
    expected = mnist.load(doubtful).predict(images)
    assert found.shape == (1000, 10) and found.dtype == np.float32
    assert np.abs(found - expected.probabilities).max() < 1e-5
    assert len(session.run(None, {"images": given[:1]})[0]) == 1  # any number of images
    assert session.get_modelmeta().custom_metadata_map["accepted"].endswith("0.5 or more")


def test_the_same_export_has_the_same_bytes(fast_run, tmp_path):
    for name in ("a", "b"):
        run("--run", fast_run, "--format", "onnx", "--output", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert onnx.load(tmp_path / "a").ir_version == 8  # what runtimes of 2022 read


def test_without_the_package(fast_run, tmp_path):
    code = (
        "import sys; sys.modules['onnx'] = sys.modules['onnx.reference'] = None\n"
        "from mnist.export.__main__ import *\n"
        "from mnist.export.config import parse_export_config\n"
        "from mnist.export.job import export\n"
        "export(parse_export_config(sys.argv[1:]))"
    )
    words = ["--run", fast_run, "--format", "onnx", "--output", tmp_path / "model.onnx"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert "InputError: --format onnx takes the package onnx: pip install onnx" in done.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- the page

SKELETONS = {  # from the upper left corner, 1 high; a list of points for each stroke
    0: [[(0.5, 0), (0.15, 0.2), (0.1, 0.7), (0.45, 1), (0.8, 0.75), (0.85, 0.25), (0.5, 0)]],
    1: [[(0.3, 0.2), (0.5, 0), (0.5, 1)]],
    2: [[(0.1, 0.25), (0.4, 0), (0.8, 0.2), (0.6, 0.55), (0.1, 1), (0.9, 0.95)]],
    3: [[(0.1, 0.1), (0.6, 0), (0.8, 0.25), (0.4, 0.45), (0.85, 0.7), (0.5, 1), (0.1, 0.9)]],
    4: [[(0.3, 0), (0.1, 0.55), (0.9, 0.55)], [(0.7, 0.1), (0.65, 1)]],
    5: [
        [(0.2, 0), (0.15, 0.45), (0.7, 0.45), (0.8, 0.8), (0.4, 1), (0.1, 0.9)],
        [(0.2, 0), (0.8, 0)],
    ],
    6: [[(0.7, 0), (0.25, 0.4), (0.15, 0.8), (0.5, 1), (0.8, 0.75), (0.5, 0.55), (0.2, 0.75)]],
    7: [[(0.1, 0.05), (0.85, 0), (0.55, 0.5), (0.4, 1)]],
    8: [
        [
            (0.7, 0.1),
            (0.3, 0.05),
            (0.25, 0.3),
            (0.75, 0.7),
            (0.5, 1),
            (0.2, 0.75),
            (0.75, 0.3),
            (0.7, 0.1),
        ]
    ],
    9: [[(0.8, 0.25), (0.45, 0), (0.2, 0.3), (0.5, 0.5), (0.8, 0.25), (0.75, 1)]],
}


def drawings(count):
    """Digits of many sizes, places and slants, some beyond the field's border, as shares of it."""
    generator = np.random.default_rng(23)
    for number in range(count):
        size, wide = generator.uniform(0.1, 0.95), generator.uniform(0.5, 1)
        turn = generator.normal(0, 0.2)
        middle = generator.uniform(0.5 * size - 0.05, 1.05 - 0.5 * size, 2)
        bend = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        strokes = []
        for stroke in SKELETONS[number % 10]:
            corners = (np.array(stroke) - 0.5) * [wide, 1] + generator.normal(
                0, 0.03, (len(stroke), 2)
            )
            steps = np.linspace(0, len(corners) - 1, 8 * len(corners))
            points = [np.interp(steps, range(len(corners)), side) for side in corners.T]
            strokes.append((np.stack(points, 1) @ bend.T * size + middle).tolist())
        yield strokes


DRAWS = """
const send = (kind, [x, y]) => {
  const box = field.getBoundingClientRect();
  field.dispatchEvent(new PointerEvent(kind, {
    pointerId: 7, button: 0, bubbles: true,
    clientX: box.left + x * box.width, clientY: box.top + y * box.height,
  }));
};
const found = [];
for (const strokes of DRAWINGS) {
  clear();
  for (const points of strokes) {
    send("pointerdown", points[0]);
    points.slice(1).forEach(point => send("pointermove", point));
    send("pointerup", points[points.length - 1]);
  }
  const { image, probabilities } = answer();
  const says = document.getElementById("digit").textContent;
  found.push({ image: [...image], probabilities, says, drawn: field.toDataURL() });
}
document.body.textContent = JSON.stringify(found);
"""


def in_page(browser, source, script):
    """What a script writes into the page's body, run at its end."""
    dumped = browser(source.replace("</body>", f"<script>{script}</script></body>"), "--dump-dom")
    return json.loads(re.search(r"<body[^>]*>(.*)</body>", dumped, re.S)[1])


@pytest.mark.parametrize("kind", ["fast", "doubtful"])
def test_the_page_answers_as_python_does(browser, fast_run, doubtful, kind):
    path = doubtful if kind == "doubtful" else fast_run
    model, number = mnist.load(path), 200 if kind == "fast" else 20
    source = draw_page(model.network, "name", "0" * 64)
    script = DRAWS.replace("DRAWINGS", json.dumps(list(drawings(number))))
    found = in_page(browser, source, script)
    assert len(found) == number
    inks = []
    for drawing in found:
        png = base64.b64decode(drawing["drawn"].partition(",")[2])
        inks.append(np.asarray(Image.open(io.BytesIO(png)))[..., 3])
    expected = normalise_digits(inks).images
    images = np.array([drawing["image"] for drawing in found], np.uint8).reshape(-1, 28, 28)
    assert np.abs(images.astype(int) - expected).max() <= 2
    assert len(np.unique(images.reshape(number, -1), axis=0)) == number  # drawings, not one of them
    said = model.predict(expected, prepare="as-is")
    probabilities = np.array([drawing["probabilities"] for drawing in found])
    assert (probabilities.argmax(1) == said.digits).all()
    itself = model.predict(images, prepare="as-is")
    assert np.abs(probabilities - itself.probabilities).max() < 1e-5
    threshold = model.threshold or 0.9
    shown = [
        f"{d}" if p >= threshold else f"{d}?"
        for d, p in zip(itself.digits, itself.confidences, strict=True)
    ]
    assert [drawing["says"] for drawing in found] == shown
    assert {len(text) for text in shown} == {1, 2}  # sure ones and doubtful ones
    right = np.mean(probabilities.argmax(1) == np.arange(number) % 10)
    assert right > 0.6  # they are digits, if not a person's


def test_an_empty_field_has_no_answer(browser, fast_run):
    source = draw_page(load_model(fast_run / "model.safetensors"), "name", "0" * 64)
    script = """
      const before = [answer().image, document.getElementById("says").textContent];
      const disabled = document.getElementById("clear").disabled;
      document.body.textContent = JSON.stringify([...before, disabled]);
    """
    assert in_page(browser, source, script) == [None, "Draw a digit", True]


def test_undo_a_second_finger_and_a_lost_one(browser, fast_run):
    source = draw_page(load_model(fast_run / "model.safetensors"), "name", "0" * 64)
    script = """
      const send = (kind, pointerId, x, y) => field.dispatchEvent(new PointerEvent(kind, {
        pointerId, button: 0, bubbles: true, clientX: x, clientY: y }));
      send("pointerdown", 1, 50, 80); send("pointerdown", 2, 200, 80);
      send("pointermove", 2, 200, 200);
      send("pointermove", 1, 60, 90); send("pointercancel", 1, 60, 90);
      const points = strokes.map(stroke => stroke.length);
      send("pointerdown", 3, 90, 90); send("pointerup", 3, 90, 90);
      const two = strokes.length;
      document.getElementById("undo").click();
      const one = strokes.length;
      send("pointerdown", 4, 50, 90);
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "z", ctrlKey: true }));
      send("pointermove", 4, 90, 90);
      const none = strokes.length;
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
      document.body.textContent = JSON.stringify([points, two, one, none, strokes.length]);
    """
    assert in_page(browser, source, script) == [[2], 2, 1, 1, 0]


def test_the_page_asks_for_nothing_and_fits(browser, fast_run):
    model = load_model(fast_run / "model.safetensors")
    source = draw_page(model, "<b>&name\udc80" * 5, "0" * 64)
    assert len(source.encode()) < 4e6
    assert "<b>&name" not in source and "&lt;b&gt;&amp;name?" in source
    assert not re.search(r"""(src|href)=["'](?!data:)|https?:|@import|url\(""", source)
    frames = ""
    for width in (320, 375, 1280):  # a window has a least width, a frame has not
        frames += f'<iframe srcdoc="{html.escape(source)}" style="width:{width}px; border:0">'
        frames += "</iframe>"
    script = """
      document.title = [...document.querySelectorAll("iframe")].map(
        frame => frame.contentDocument.documentElement.scrollWidth).join();
    """
    outer = f"<title></title><body>{frames}<script>onload = () => {{{script}}}</script>"
    dumped = browser(outer, "--dump-dom", "--window-size=1600,900")
    assert re.search(r"<title>([\d,]+)</title>", dumped)[1] == "320,375,1280"


# ------------------------------------------------------------------------------------- the job


def test_where_files_go(fast_run, tmp_path, capsys, monkeypatch):
    whole = tmp_path / "run"
    shutil.copytree(fast_run, whole)
    for kind, name in (("onnx", "model.onnx"), ("html", "draw.html")):
        run("--run", whole, "--format", kind)
        run("--model", whole / "model.safetensors", "--format", kind)  # its own is replaced
        assert capsys.readouterr().out.count(f"wrote       {whole / 'export' / name}") == 2
    (whole / "model.safetensors").unlink()
    run("--run", whole, "--format", "onnx")
    assert "is not finished: its checkpoint of step" in capsys.readouterr().out
    (checkpoint,) = sorted((whole / "checkpoints").iterdir())[-1:]
    before = sorted(checkpoint.iterdir())
    run("--model", checkpoint / "model.safetensors", "--format", "onnx")
    assert sorted(checkpoint.iterdir()) == before
    assert sorted(file.name for file in (whole / "export").iterdir()) == ["draw.html", "model.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "neither": (["--format", "onnx"], "give one of --run FOLDER or --model FILE"),
        "both": (["--run", "r", "--model", "m", "--format", "onnx"], "give one of --run"),
        "no format": (["--run", "r"], "give --format onnx or --format html"),
        "another": (["--run", "r", "--format", "pdf"], "--format"),
        "input": (["--run", "r", "--format", "html", "--input", "float"], "--input takes --format"),
        "no run": (["--run", "none", "--format", "onnx"], "--run none: no such run folder"),
        "no model": (["--model", "none", "--format", "html"], "--model none: no such file"),
        "no weights": (["--run", "empty", "--format", "html"], "empty: has no weights"),
        "a file of the user's": (
            ["--model", "model", "--format", "html", "--output", "own.html"],
            "own.html is no export of this package, and stays as it is",
        ),
        "a folder": (
            ["--model", "model", "--format", "html", "--output", "empty"],
            "empty: Is a directory; --output takes the name of a file",
        ),
        "no folder": (
            ["--model", "model", "--format", "html", "--output", "none/x"],
            "none/x: No such file or directory; nothing was changed",
        ),
    }.values(),
)
def test_refusals(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.html").write_text("mine")
    save_model(MLP((32, 24, 16, 12)).initialise(0), tmp_path / "model")
    with pytest.raises(InputError, match=re.escape(message)):
        run(*words)
    assert (tmp_path / "own.html").read_text() == "mine"
    assert not list((tmp_path / "empty").iterdir())
