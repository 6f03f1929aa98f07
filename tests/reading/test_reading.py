"""Numbers on pages made from MNIST's digits, each property on its own, by a short reader."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_pages import ink_of, on_paper
from PIL import Image, ImageOps

from mnist.distributed import World
from mnist.evaluation.scoring import predict
from mnist.model import MLP, load_model
from mnist.pictures import Frame
from mnist.reading.photo import find_photos, load_pages
from mnist.reading.reader import _trust, read_pages
from mnist.reading.truth import align

ROOT = Path(__file__).parents[2]
SHORT = (
    "--recipe reader --hidden-sizes 384 256 128 64 --epochs 5 --batch-size 256 --rotation 8 "
    "--shift 1 --elastic 0.8 --other-hands 0.2 --non-digits 0.3 --learning-rate 0.002"
).split()


@pytest.fixture(scope="session")
def model_file(data_dir, tmp_path_factory):
    """A reader that was trained for seconds; what is asked of it here is asked of such a one."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--data-dir", str(data_dir), "--runs-dir", str(runs), "--run-name", "short"]
    command = [sys.executable, str(ROOT / "jobs/train.py"), *SHORT, *words, "--evaluate", "none"]
    subprocess.run([*command, "--wandb", "disabled"], check=True, capture_output=True, timeout=300)
    return runs / "short" / "model.safetensors"


@pytest.fixture(scope="session")
def model(model_file):
    return load_model(model_file)


@pytest.fixture(scope="session")
def read(model):
    def of(page):
        frame = Frame(page, (page.shape[1], page.shape[0]))
        return read_pages([frame], lambda images: predict(model, images, World()))[0]

    return of


def texts(page):
    return [
        " ".join("".join(str(d.value) for d in number.digits) for number in line.numbers)
        for line in page.lines
    ]


def digits(page):
    return [d for line in page.lines for number in line.numbers for d in number.digits]


def right(page, lines):
    """The share of the digits that were read, and how many were invented."""
    truth, found = "".join(lines).replace(" ", ""), "".join(texts(page)).replace(" ", "")
    pairs = align(truth, found)
    good = sum(
        here is not None and there is not None and truth[here] == found[there]
        for here, there in pairs
    )
    return good / len(truth), len(found) - good


LINES = ["27182818", "14142135", "57721566", "16180339"]


@pytest.fixture(scope="module")
def ink(data_dir):
    return ink_of(data_dir, LINES)


def test_lines_from_top_to_bottom(read, ink):
    page = read(on_paper(ink))
    assert len(page.lines) == 4 and all(len(line.numbers) == 1 for line in page.lines)
    share, others = right(page, LINES)
    assert share >= 0.9 and others <= 3


def test_numbers_are_parted_by_wide_gaps(read, data_dir):
    page = read(on_paper(ink_of(data_dir, ["314 15", "92 653"])))
    assert [[len(number.digits) for number in line.numbers] for line in page.lines] == [
        [3, 2],
        [2, 3],
    ]


def test_light_on_dark_reads_the_same(read, ink):
    page = on_paper(ink)
    assert texts(read(255 - page)) == texts(read(page))
    assert read(255 - page).inverted and not read(page).inverted


@pytest.mark.parametrize("slope", [0.06, -0.06])
def test_lines_that_climb_are_followed(read, data_dir, slope):
    ink = ink_of(data_dir, LINES, slope=abs(slope))
    page = on_paper(ink if slope > 0 else np.flipud(ink_of(data_dir, LINES, slope=0.06)))
    if slope < 0:  # upside down digits say nothing of their values; lines are found all the same
        assert len(read(page).lines) >= 4
        return
    found = read(page)
    assert len(found.lines) == 4
    assert right(found, LINES)[0] >= 0.85


def test_digits_of_a_real_photo(read):
    """Its licence lies beside it."""
    (frame,) = load_pages(Path(__file__).with_name("real_photo.png"))
    page = read(frame.pixels)
    share, others = right(page, ["52306"])
    assert len(page.lines) == 1 and share >= 0.8 and others <= 1


@pytest.mark.parametrize("slant", [0.5, -0.4])
def test_lines_that_slant_are_made_upright(read, ink, slant):
    page = on_paper(ink)
    height, width = page.shape
    lying = Image.fromarray(page).transform(
        (width + height // 2, height),
        Image.Transform.AFFINE,
        (1, slant, -max(slant, 0) * height, 0, 1, 0),
        Image.Resampling.BILINEAR,
        fillcolor=int(page[0, 0]),
    )
    share, others = right(read(np.asarray(lying)), LINES)
    assert share >= 0.85 and others <= 4
    # Where boxes lie is told of the page, not of the upright line.
    for digit in digits(read(np.asarray(lying))):
        left, top, wide, tall = (round(side) for side in digit.box)
        inside = np.asarray(lying)[top : top + tall, left : left + wide] < 128
        assert inside[0].any() or inside[1].any()
        assert inside[:, :2].any() and inside[:, -2:].any()


def test_fine_strokes_are_enlarged(read, data_dir):
    ink = ink_of(data_dir, LINES, height=24)
    page = read(on_paper(ink))
    share, others = right(page, LINES)
    assert share >= 0.8 and others <= 5
    assert page.size == ink.shape[::-1]
    found = digits(page)
    assert max(d.box[0] + d.box[2] for d in found) <= ink.shape[1]
    assert max(d.box[1] + d.box[3] for d in found) > 0.7 * ink.shape[0]


def test_touching_digits_are_cut(read, data_dir):
    lines = ["1000", "2005", "3600", "80000"]
    page = read(on_paper(ink_of(data_dir, lines, gap=-0.03)))
    share, _ = right(page, lines)
    assert share >= 0.75


def test_a_page_on_its_side_or_head_is_turned(read, ink):
    page = on_paper(ink)
    for turns in (1, 2, 3):
        found = read(np.ascontiguousarray(np.rot90(page, turns)))
        assert found.turned == 4 - turns
        assert right(found, LINES)[0] >= 0.9
    assert read(page).turned == 0


def test_boxes_lie_on_the_digits(read, ink):
    page = read(on_paper(ink))
    for digit in digits(page):
        left, top, width, height = digit.box
        part = ink[round(top) : round(top + height), round(left) : round(left + width)] > 0.2
        edges = part[:2], part[-2:], part[:, :2], part[:, -2:]  # it is tight
        assert all(edge.any() for edge in edges)


def test_a_digit_that_is_cut_off_is_known(read, data_dir):
    ink = ink_of(data_dir, ["58203"])
    columns = np.flatnonzero((ink > 0.3).any(0))
    found = digits(read(on_paper(ink[:, columns[0] + 12 :])))
    assert found[0].cut_off and not any(digit.cut_off for digit in found[1:])


@pytest.mark.parametrize("ground", ["even", "noisy", "ruled"])
def test_nothing_is_read_where_nothing_is_written(read, ground):
    page = np.full((400, 600), 220.0)
    if ground == "ruled":
        page[40::40] = page[41::40] = 140
    if ground != "even":
        page += np.random.default_rng(0).normal(0, 5, page.shape)
    assert not digits(read(page.clip(0, 255).round().astype(np.uint8)))


def test_company_in_doubt_makes_digits_less_sure():
    assert _trust([0.99] * 11) == 1 and _trust([]) == 1
    assert _trust([0.5, 0.5, 0.5]) == 1  # few: they may be badly written
    assert _trust([0.999] * 40) == 1
    assert _trust([1.0] * 15 + [0.0] * 5) == pytest.approx(0.75**6)  # as in print


# ------------------------------------------------------------------------------------ the job


def run(*words, code=0):
    command = [sys.executable, str(ROOT / "jobs/read.py"), *map(str, words), "--threads", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def photos(data_dir, tmp_path_factory):
    """A folder of photos, good and bad."""
    folder = tmp_path_factory.mktemp("photos")
    for name, lines in (("a.png", ["1204", "77"]), ("b.jpg", ["365"])):
        Image.fromarray(on_paper(ink_of(data_dir, lines))).save(folder / name, quality=95)
    pages = [Image.fromarray(on_paper(ink_of(data_dir, [text]))) for text in ("10", "20")]
    pages[0].save(folder / "c.tiff", save_all=True, append_images=pages[1:])
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:900])
    (folder / "e.jpg").write_bytes(b"")
    Image.new("L", (300, 200), 230).save(folder / "f.png")
    (folder / "truth.csv").write_text("file,truth\na.png,1204/77\nb.jpg,365\n")
    return folder


def rows(output):
    with (output / "readings.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_photos(model_file, photos, tmp_path):
    result = run(
        "--model", model_file, photos, "--truth", photos / "truth.csv", "--output-dir", tmp_path
    )
    assert "read        4 of 6 files" in result.stdout
    found = rows(tmp_path)
    assert sorted({Path(row["file"]).name for row in found}) == [
        "a.png", "b.jpg", "c.tiff", "d.png", "e.jpg", "f.png",
    ]  # fmt: skip
    statuses = {Path(row["file"]).name: row["status"] for row in found}
    assert statuses["d.png"] == statuses["e.jpg"] == "error" and statuses["f.png"] == "none"
    assert all(row["message"] for row in found if row["status"] == "error")
    tiff = [row for row in found if row["file"].endswith("c.tiff")]
    assert [row["page"] for row in tiff] == ["1", "2"]
    for row in found:
        if row["status"] in ("accepted", "doubtful", "rejected"):
            known = json.loads(row["digits"])
            assert len(known) == len(row["text"])
            for (value, *_), character in zip(known, row["text"], strict=True):
                assert character in ("?", str(value))
    report = json.loads((tmp_path / "readings.json").read_text())
    assert report["scores"]["photos"] == 2 and report["counts"]["files_error"] == 2
    page = (tmp_path / "readings.html").read_text()
    assert page.count("data:image/jpeg") == 5 and "http" not in page.replace("http-equiv", "")


def test_the_eight_orientations_read_the_same(model_file, photos, tmp_path):
    for orientation in range(1, 9):
        with Image.open(photos / "a.png") as image:
            exif = image.getexif()
            exif[0x0112] = orientation
            inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of PIL's transpositions
            stored = image if orientation == 1 else image.transpose(inverse[orientation])
            stored.save(tmp_path / f"{orientation}.png", exif=exif)
        with Image.open(tmp_path / f"{orientation}.png") as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        assert (upright == np.asarray(Image.open(photos / "a.png"))).all()
    run("--model", model_file, tmp_path, "--output-dir", tmp_path / "out")
    found = rows(tmp_path / "out")
    by_file = {}
    for row in found:
        by_file.setdefault(row["file"], []).append([row["text"], row["left"], row["digits"]])
    assert len(by_file) == 8 and len({json.dumps(value) for value in by_file.values()}) == 1


def test_the_same_file_named_twice_is_read_once(photos):
    named = [photos / "a.png", photos, photos / ".." / photos.name / "b.jpg"]
    assert len(find_photos(named)) == 6


def test_pages_of_large_photos_are_reduced_and_boxes_are_not(tmp_path, read, data_dir):
    ink = ink_of(data_dir, ["12345678"], height=500)
    Image.fromarray(on_paper(ink)).save(tmp_path / "large.png")
    (frame,) = load_pages(tmp_path / "large.png")
    assert max(frame.pixels.shape) <= 2000 < max(frame.size)
    found = digits(
        read_pages([frame], lambda images: np.log(np.full((len(images), 10), 0.1)))[0]
    ) or digits(read(on_paper(ink)))
    assert max(d.box[0] for d in found) > 2000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --run FOLDER or --model FILE; scripts/train --recipe reader"),
        (["--model", "MODEL"], "name the photos to read"),
        (["--model", "MODEL", "--run", "runs/x", "a.png"], "give one of --run"),
        (["--model", "MODEL", "missing.png"], "missing.png: cannot be read as an image"),
        (["--model", "MODEL", "e.jpg", "d.png"], "none of 2 files can be read"),
        (["--model", "MODEL", "a.png", "--truth", "b.jpg"], "--truth"),
        (["--model", "MODEL", "a.png", "--zap"], "--zap"),
    ],
)
def test_bad_input_is_one_line(model_file, photos, tmp_path, words, message):
    words = [
        str(model_file) if word == "MODEL" else photos / word if "." in word else word
        for word in words
    ]
    output = ["--output-dir", tmp_path / "out"] if words else []
    result = run(*words, *output, code=2)
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_readings_of_other_photos_stay(model_file, photos, tmp_path):
    link = tmp_path / "model.safetensors"
    link.write_bytes(model_file.read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes((photos / "b.jpg").read_bytes())
    run("--model", link, photos / "a.png")
    first = (tmp_path / "readings/a/readings.csv").read_bytes()
    result = run("--model", link, tmp_path / "other/a.png")
    assert "which stays: these go to" in result.stdout
    assert (tmp_path / "readings/a/readings.csv").read_bytes() == first
    assert len(list((tmp_path / "readings").iterdir())) == 2
    run("--model", link, photos / "a.png")  # the same again replaces its own
    assert len(list((tmp_path / "readings").iterdir())) == 2


def test_a_model_without_threshold_accepts_nothing(photos, tmp_path):
    from mnist.model import save_model

    save_model(MLP((8, 8, 8, 8)).initialise(0), tmp_path / "plain.safetensors")
    result = run(
        "--model", tmp_path / "plain.safetensors", photos / "a.png", "--output-dir", tmp_path / "o"
    )
    assert "has no temperature and no threshold" in result.stdout
    assert not [row for row in rows(tmp_path / "o") if row["status"] == "accepted"]
