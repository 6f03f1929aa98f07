"""The page of an evaluation: what it says, that it asks for nothing, and how a browser shows it."""

import base64
import copy
import html
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import jinja2
import numpy as np
import pytest
from PIL import Image

from mnist.evaluation.page import MOST_POINTS, render_page

VOID = {"meta", "link", "img", "br"}
DRAWN = {"path", "rect", "circle", "polyline"}  # closed by />, as SVG has it


class Page(HTMLParser):
    """Tags with attributes, and text; every tag must be closed in its turn."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in DRAWN
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)

    def all(self, tag, **wanted):
        return [a for name, a in self.tags if name == tag and wanted.items() <= a.items()]


def example(index, label, prediction, confidence):
    return {"index": index, "label": label, "prediction": prediction, "confidence": confidence}


MATRIX = [[980 if row == column else 0 for column in range(10)] for row in range(10)]
MATRIX[4][9], MATRIX[7][2], MATRIX[1][1] = 12, 5, 1135
BINS = [{"from": k / 15, "to": (k + 1) / 15, "number": 0} for k in range(15)]
BINS = [bin | {"confidence": None, "accuracy": None} for bin in BINS]
BINS[8] |= {"number": 7, "confidence": 0.57, "accuracy": 0.5}
BINS[14] |= {"number": 9993, "confidence": 0.99, "accuracy": 0.98}

FULL = {
    "title": "baseline-seed0 on MNIST test images",
    "model": {
        "path": "runs/x/model.safetensors",
        "sha256": "a" * 64,
        "hidden_sizes": [512, 256, 128, 64],
        "step": None,
        "temperature": None,
    },
    "data": {
        "description": "MNIST test images",
        "images": "data/t10k-images",
        "labels": "data/t10k-labels",
        "images_sha256": "b" * 64,
        "labels_sha256": "c" * 64,
    },
    "expected": 10000,
    "prepare": "as-is",
    "prepared": {"as_they_are": 10000, "inverted": 0, "normalised": 0},
    "scored": 10000,
    "without_digit": 0,
    "acceptance": None,
    "prepared_examples": [],
    "labelled": 10000,
    "correct": 9837,
    "accuracy": 0.9837,
    "accuracy_interval_95": [0.981, 0.9862],
    "cross_entropy": 0.0940,
    "without_disputed_labels": {
        "number": 9985,
        "correct": 9833,
        "accuracy": 0.98478,
        "accuracy_interval_95": [0.9822, 0.987],
        "disputed_labels": [947, 1621, *range(2000, 2013)],
    },
    "digits": [
        {
            "digit": digit,
            "precision": None if digit == 0 else 0.9914,
            "recall": 0.9821,
            "f1": 0.9867,
            "support": 1000 + digit,
            "predicted": 1000,
        }
        for digit in range(10)
    ],
    "confusion_matrix": MATRIX,
    "calibration": {"expected_calibration_error": 0.01234, "bins": BINS},
    "confusions": [
        {"label": 4, "prediction": 9, "number": 12},
        {"label": 7, "prediction": 2, "number": 5},
    ],
    "mistakes": [example(247 + k, 4, 2, 0.999999 - k / 1000) for k in range(24)],
    "least_confident": [example(600 + k, 6, 6 - k % 2, 0.2512 + k / 1000) for k in range(24)],
    "warnings": [],
    "throughput": {"images_per_second": 83012.4, "seconds": 0.1205},
    "world_size": 2,
    "threads": 1,
    "device": "cpu",
    "hardware": "AMD EPYC",
    "precision": "bf16",
    "batch_size": 1024,
    "versions": {"python": "3.11.2", "torch": "2.15.0"},
    "commit": None,
    "predictions_sha256": "d" * 64,
    "time": "2026-11-23T07:00:00+00:00",
}
NO_LABELS = FULL | {
    "labelled": 0,
    "digits": [
        {"digit": digit, "predicted": 1000}
        | dict.fromkeys(("precision", "recall", "f1", "support"))
        for digit in range(10)
    ],
    "least_confident": [image | {"label": None} for image in FULL["least_confident"]],
}
NO_LABELS |= dict.fromkeys(
    "correct accuracy accuracy_interval_95 cross_entropy without_disputed_labels confusion_matrix "
    "calibration confusions mistakes".split()
)
PERFECT = FULL | {"correct": 10000, "accuracy": 1.0, "confusions": [], "mistakes": []}
ROWS = [{"step": k, "epoch": k / 50, "train/loss": 2 / k, "train/accuracy": 1 - 0.9 / k}
        for k in range(1, 201)]  # fmt: skip
for row in ROWS[49::50]:
    row |= {"validation/loss": 0.3, "validation/accuracy": 0.95}
INK = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
PICTURES = {index: INK for index in [*range(247, 271), *range(600, 624)]}


def page_of(report, rows=()):
    return Page(render_page(report, PICTURES, rows))


def test_key_figures():
    text = page_of(FULL, ROWS).text
    for said in [
        "98.37% 95% interval 98.10% to 98.62%",
        "9,837 of 10,000",
        "163 wrong",
        "Cross-entropy 0.0940",
        "calibration error 0.0123",
        "Without the 15 disputed labels 98.48%",
        "9,833 of 9,985 right",
        "human raters did not confirm",
        "bf16, batches of 1,024",
        "2 processes of 1 thread",
        "83,012 images/s",
        "0 – 98.21% 98.67% 1,000 1,000",  # a digit that was never predicted has no precision
        "1 99.14% 98.21% 98.67% 1,001 1,000",
        "4 → 9 12 1.20%",
        "15 equal-width bins",
        "24 of 163 mistakes",
        "label 4 predicted 2 >99.99% image 247",
        "label 6 predicted 5 25.22% image 601",
        "Commit –",
        "947, 1621, 2000",
        "torch 2.15.0",
        *("a" * 64, "b" * 64, "c" * 64, "d" * 64),
    ]:
        assert said in text, said


def test_no_warning_where_all_is_well():
    assert not page_of(FULL).all("aside")


def test_matrix_shades_mistakes_alone():
    page = page_of(FULL)
    assert [cell["style"] for cell in page.all("td", **{"class": "mistake"})] == [
        "--share:1.00",
        "--share:0.42",
    ]
    assert len(page.all("td", **{"class": "right"})) == 10
    assert "1,135" in page.text


def test_pictures_are_dark_ink_on_white():
    first = page_of(FULL).all("img")[0]
    contents = base64.b64decode(first["src"].removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(io.BytesIO(contents))) == 255 - INK).all()
    assert first["alt"] == "image 247: label 4, predicted 2"


def test_calibration_shows_only_bins_with_images():
    page = page_of(FULL)
    assert [bar["class"] for bar in page.all("rect")] == ["bar few", "bar"]
    assert float(page.all("rect")[0]["height"]) == 100  # of 200: half of the seven are right


@pytest.mark.parametrize("report", [FULL, NO_LABELS, PERFECT])
def test_asks_for_nothing(report):
    source = render_page(report, PICTURES, ROWS)
    page = Page(source)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name in {"src", "href", "srcset", "xlink:href", "action", "poster"} & set(attributes):
            assert attributes[name].startswith("data:"), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "://" not in source and "@import" not in source and "url(" not in source
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]


@pytest.mark.parametrize("report", [FULL, NO_LABELS, PERFECT])
def test_semantics(report):
    page = page_of(report, ROWS)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert page.all("meta", name="viewport")
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(
        identifiers
    )
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in heading for heading in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))
    outer = [svg for svg in page.all("svg") if "role" in svg]
    assert len(page.all("title")) == 1 + len(outer)


def test_names_are_escaped():
    name = '<b>&".png'
    report = copy.deepcopy(FULL)
    report["mistakes"][0]["file"] = report["title"] = name
    report["warnings"] = [name]
    page = page_of(report)
    assert not page.all("b")
    assert page.text.count(name) == 4  # as title, heading, warning, and below the picture
    assert page.all("img")[0]["alt"] == f"{name}: label 4, predicted 2"


def test_name_that_is_not_unicode_can_be_written():
    report = copy.deepcopy(FULL)
    report["mistakes"][0]["file"] = b"3/\xff.png".decode(errors="surrogateescape")
    assert b"3/?.png" in render_page(report, PICTURES, ()).encode()


def test_without_labels():
    page = page_of(NO_LABELS)
    assert "There were no labels" in page.text
    assert "3 1,000 10.00%" in page.text
    assert "no label predicted 5" in page.text
    for absent in ("accuracy", "Confusion", "Calibration", "mistakes", "entropy", "wrong"):
        assert absent not in page.text, absent


def test_some_labels():
    text = page_of(FULL | {"scored": 12500, "expected": 12500}).text
    assert "Accuracy over the 10,000 labelled images (of 12,500 evaluated)" in text
    assert "Counts over the 10,000 labelled images" in text
    assert "12,500 images, 10,000 labelled" in text


def test_perfect_model():
    page = page_of(PERFECT)
    assert "100.00%" in page.text
    assert page.text.count("None: every prediction is right.") == 2


def test_warnings_come_before_the_accuracy():
    text = page_of(FULL | {"warnings": ["12 look inverted"], "expected": 10020}).text
    assert text.index("12 look inverted") < text.index("98.37%")
    assert "Only 10,000 of 10,020 images were evaluated" in text


def test_checkpoint_says_so_at_the_top():
    text = page_of(FULL | {"model": FULL["model"] | {"step": 1936}}).text
    assert text.index("Checkpoint of an unfinished run") < text.index("98.37%")
    assert "after step 1,936" in text


@pytest.mark.parametrize("field", ["accuracy", "precision", "digits"])
def test_missing_field_is_an_error(field):
    report = {key: value for key, value in FULL.items() if key != field}
    with pytest.raises((jinja2.UndefinedError, TypeError), match=f"Undefined|{field}"):
        render_page(report, PICTURES, ())


def test_missing_picture_is_an_error():
    with pytest.raises(KeyError, match="623"):
        render_page(FULL, {k: v for k, v in PICTURES.items() if k != 623}, ())


# ------------------------------------------------------------------------------------- curves


def points(page, part):
    """Of the loss and of the accuracy, as pairs of numbers."""
    lines = page.all("polyline", **{"class": part})
    return [[tuple(map(float, p.split(","))) for p in line["points"].split()] for line in lines]


def test_curves():
    page = page_of(FULL, ROWS)
    loss, accuracy = points(page, "train")
    assert len(loss) == len(accuracy) == 200
    assert loss[-1][0] == 340 and loss[0][0] == pytest.approx(340 / 200, abs=0.1)
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # falls: downwards is larger
    validation, _ = points(page, "validation")
    assert [x for x, _ in validation] == [85, 170, 255, 340]
    assert all(5 <= y <= 205 for _, y in loss + validation)


def test_curves_are_optional():
    assert "Training" not in page_of(FULL).text
    assert "Training" not in page_of(FULL, [{"step": 1, "epoch": 1.0}]).text
    without = [{k: v for k, v in row.items() if "validation" not in k} for row in ROWS]
    page = page_of(FULL, without)
    assert len(points(page, "train")) == 2
    assert not points(page, "validation") and "validation" not in page.text


def test_curve_of_one_row_and_of_odd_losses():
    assert page_of(FULL, ROWS[:1])
    odd = [{"epoch": k, "train/loss": loss} for k, loss in enumerate([0.5, 0.0, float("nan"), 0.2])]
    (loss,) = points(page_of(FULL, odd), "train")
    assert [x for x, _ in loss] == [0, 113.3, 340]
    assert loss[1][1] == 205  # 0 has no logarithm: at the bottom


def test_long_runs_are_thinned():
    rows = [row | {"epoch": k} for k, row in enumerate(ROWS * 50)]
    source = render_page(FULL, PICTURES, rows)
    page = Page(source)
    loss, _ = points(page, "train")
    assert len(loss) == MOST_POINTS and loss[0][0] == 0 and loss[-1][0] == 340
    assert "400 of 10,000 rows are drawn" in page.text
    assert len(source.encode()) < 200_000
    assert "rows are drawn" not in page_of(FULL, ROWS).text


# --------------------------------------------------------------------------------- in a browser


def test_nothing_is_wider_than_the_page(browser):
    frames, widths = "", [320, 360, 1200]
    for report in (FULL, NO_LABELS):
        name = f"scans/{'a_very_long_name' * 4}.png"
        shown = [image | {"file": name} for image in report["least_confident"]]
        source = render_page(report | {"least_confident": shown}, PICTURES, ROWS)
        for width in widths:  # a window has a least width, a frame has not
            frames += f'<iframe srcdoc="{html.escape(source)}" style="width:{width}px; border:0">'
            frames += "</iframe>"
    script = """
        document.title = [...document.querySelectorAll("iframe")].flatMap(frame => [
            frame.contentDocument.documentElement.scrollWidth,
            [...frame.contentDocument.images].filter(image => image.naturalWidth == 28).length,
        ]).join();
    """
    outer = f"<title></title><body>{frames}<script>onload = () => {{{script}}}</script>"
    dumped = browser(outer, "--dump-dom", "--window-size=1600,900")
    measured = [int(n) for n in re.search(r"<title>([\d,]+)</title>", dumped)[1].split(",")]
    assert measured[::2] == widths * 2
    assert measured[1::2] == [48] * 3 + [24] * 3  # pictures that were decoded


def test_light_and_dark(browser, tmp_path):
    def corner_and_darkest(scheme):
        path = tmp_path / f"{scheme}.png"
        scheme_option = f"--blink-settings=preferredColorScheme={scheme}"
        browser(render_page(FULL, PICTURES, ROWS), scheme_option, f"--screenshot={path}")
        pixels = np.asarray(Image.open(path).convert("L"))
        return pixels[0, 0], pixels.min(), pixels.max()

    dark, light = corner_and_darkest(0), corner_and_darkest(1)
    assert dark[0] < 40 and dark[2] > 200  # light letters on a dark ground
    assert light[0] == 255 and light[1] < 50


def test_print_is_light_and_whole(browser, tmp_path):
    if shutil.which("pdftotext") is None or shutil.which("pdftoppm") is None:
        pytest.skip("no pdftotext and pdftoppm (poppler-utils) to look at the print with")
    path = tmp_path / "page.pdf"
    dark = "--blink-settings=preferredColorScheme=0"
    browser(render_page(FULL, PICTURES, ROWS), dark, f"--print-to-pdf={path}")
    text = subprocess.run(["pdftotext", path, "-"], capture_output=True, text=True, check=True)
    assert "98.37%" in text.stdout
    assert "d" * 64 in text.stdout  # of the provenance, which is closed on the screen
    subprocess.run(
        ["pdftoppm", "-r", "20", "-png", "-singlefile", path, tmp_path / "page"], check=True
    )
    assert np.asarray(Image.open(tmp_path / "page.png").convert("L")).mean() > 200
