"""Reading as a batch: exactly once, killed and continued, whatever the files and however many."""

import csv
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from filelock import FileLock
from made_pages import ink_of, on_paper
from PIL import Image
from wandb_logs import logs, records

from mnist.cli import InputError
from mnist.distributed import World
from mnist.model import load_model
from mnist.pictures import Frame
from mnist.reading import job, work
from mnist.reading.config import parse_read_config
from mnist.reading.hocr import write_hocr
from mnist.reading.job import read
from mnist.reading.journal import Journal, Writer, fingerprint, stat_of, subject_of
from mnist.reading.page import MOST_BYTES, Shown, most_urgent, render_page
from mnist.reading.photo import find_photos
from mnist.reading.work import portions
from mnist.runs import folder as folder_module
from mnist.system import StopRequest

ROOT = Path(__file__).parents[2]
FILES = ("readings.csv", "readings.html")


# ----------------------------------------------------------------------------------- the journal


def record(photo, **more):
    digest = hashlib.sha256(Path(photo).read_bytes()).hexdigest()
    made = {"file": photo, "pages": [], "urgencies": [], "error": None, "unfinished": False}
    return made | {"sha256": digest, "stat": stat_of(photo), **more}


def left(journal):
    """Which files are still to be read, and which pages are shown of what has been."""
    with closing(journal.index()) as index:
        todo, pictures = journal.remaining(index)
    return todo.tolist(), [(one.file, one.page) for one in pictures]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.png").write_text(f"file {number}")
    return [str(path) for path in sorted(folder.iterdir())]


def shown(file, urgency, sha256="s", page=0):
    return Shown(file, page, urgency, sha256, "data:,", [])


def test_what_is_read_is_found_again(files, tmp_path):
    journal = Journal.begin(tmp_path / "out", files, {"model": "m"})
    with (
        closing(Writer(journal.folder, 1, 0)) as first,
        closing(Writer(journal.folder, 1, 1)) as second,
    ):
        second.add({3: record(files[3]), 4: record(files[4])}, [])
        first.add({0: record(files[0])}, [])
    with (journal.folder / "00001-00000.records").open("a") as torn:
        torn.write('1\t{"file": "cut short')
    (journal.folder / "00002-00000.records").write_text("")
    again = Journal.begin(tmp_path / "out", files, {"model": "m"})
    assert again.folder == journal.folder and again.starts() == 2
    assert Journal.join(journal.folder).photos == files
    assert left(again) == ([1, 2, 5, 6], [])
    with closing(again.index()) as index:
        assert index.record(3)["file"] == files[3]
    assert Journal.begin(tmp_path / "out", files, {"model": "n"}).folder != journal.folder
    assert Journal.begin(tmp_path / "out", files[1:], {"model": "m"}).folder != journal.folder
    again.remove()
    assert not journal.folder.exists()


def test_the_last_record_counts(files, tmp_path):
    journal = Journal.begin(tmp_path, files, {})
    with closing(Writer(journal.folder, 1, 0)) as writer:
        writer.add({2: record(files[2], error="old"), 5: record(files[5])}, [])
    with closing(Writer(journal.folder, 2, 2)) as writer:
        writer.add({2: record(files[2], error="new")}, [])
    with closing(journal.index()) as index:
        assert index.record(2)["error"] == "new" and index.has(5) and not index.has(6)


def test_more_starts_than_files_that_may_be_open(files, tmp_path):
    journal = Journal.begin(tmp_path, files, {})
    for start in range(1, 1500):
        with closing(Writer(journal.folder, start, 0)) as writer:
            writer.add({start % 7: record(files[start % 7], error=str(start))}, [])
    for _ in range(2):
        with closing(journal.index()) as index:
            found = [int(one["error"]) for one in index.records()]
        assert sorted(found) == list(range(1493, 1500))
    assert journal.starts() == 1499


def test_changes_are_noticed(files, tmp_path):
    journal = Journal.begin(tmp_path / "out", files, {})
    missing, present = files[5], files[:5]
    Path(missing).unlink()
    with closing(Writer(journal.folder, 1, 0)) as writer:
        gone = {**record(files[0]), "file": missing, "sha256": None, "stat": None, "error": "gone"}
        writer.add({n: record(photo) for n, photo in enumerate(present)} | {5: gone}, [])
    assert left(journal)[0] == [6]
    os.utime(files[0], (5, 5))  # a process that takes it looks at its bytes
    content, times = Path(files[1]).read_text(), os.stat(files[1])
    Path(files[1]).write_text(content.upper())
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and time
    Path(files[2]).write_text("another")
    Path(files[3]).unlink()
    Path(missing).write_text("now there")
    assert left(journal)[0] == [0, 1, 2, 3, 5, 6]


def pages(photo, urgencies, **more):
    return record(photo, pages=[{}] * len(urgencies), urgencies=urgencies, **more)


def test_pictures_of_what_was_read_anew_are_of_that(files, tmp_path):
    journal = Journal.begin(tmp_path, files, {})
    old, new = pages(files[0], [0.9], sha256="old"), pages(files[0], [0.2], sha256="new")
    with closing(Writer(journal.folder, 1, 0)) as writer:
        writer.add(
            {0: old, 1: pages(files[1], [0.5], sha256="b")},
            [shown(0, 0.9, "old"), shown(1, 0.5, "b")],
        )
    with closing(Writer(journal.folder, 2, 0)) as writer:
        writer.add({0: new}, [shown(0, 0.2, "new"), shown(6, 0.7, "not recorded")])
    with closing(journal.index()) as index:
        assert [(one.file, one.sha256) for one in journal.shown(index)] == [(1, "b"), (0, "new")]
    assert left(journal) == ([2, 3, 4, 5, 6], [(1, 0), (0, 0)])
    Path(files[1]).write_text("changed")
    assert left(journal) == ([1, 2, 3, 4, 5, 6], [(0, 0)])


def test_a_page_that_others_make_room_for_gets_its_picture(files, tmp_path):
    """A file of 100 urgent pages, which changes, has left another without a picture."""
    journal = Journal.begin(tmp_path, files, {})
    many = [0.9 + n / 1000 for n in range(100)]
    with closing(Writer(journal.folder, 1, 0)) as writer:
        pictures = [shown(0, urgent, "a", n) for n, urgent in enumerate(many)]
        writer.add({0: pages(files[0], many, sha256="a")}, pictures)
        writer.add({n: pages(files[n], [n / 10]) for n in range(1, 7)}, [])
    assert left(journal)[0] == []
    Path(files[0]).write_text("changed")
    assert left(journal) == ([0, 1, 2, 3, 4, 5, 6], [])
    with closing(Writer(journal.folder, 2, 0)) as writer:
        writer.add({0: pages(files[0], [0.0])}, [shown(0, 0.0, record(files[0])["sha256"])])
        again = {n: pages(files[n], [n / 10]) for n in range(1, 6)}
        writer.add(again, [shown(n, n / 10, one["sha256"]) for n, one in again.items()])
    assert left(journal) == ([6], [(5, 0), (4, 0), (3, 0), (2, 0), (1, 0), (0, 0)])


def test_of_a_long_file_the_first_pages_are_kept(files, tmp_path):
    journal = Journal.begin(tmp_path, files, {})
    first = pages(files[2], [0.3, 0.4], unfinished=True)
    with closing(Writer(journal.folder, 1, 0)) as writer:
        pictures = [shown(2, urgent, first["sha256"], n) for n, urgent in enumerate((0.3, 0.4, 1))]
        writer.add({2: first}, pictures)  # the third was not written down
    todo, pictures = left(journal)
    assert 2 in todo and pictures == [(2, 1), (2, 0)]


def test_complete_readings_are_of_the_same_files(files):
    stats = [stat_of(photo) for photo in files]
    known = fingerprint({"model": "m"}, stats)
    assert known == fingerprint({"model": "m"}, json.loads(json.dumps(stats)))
    assert known != fingerprint({"model": "n"}, stats)
    os.utime(files[3], (5, 5))
    assert known != fingerprint({"model": "m"}, map(stat_of, files))


def test_most_urgent_does_not_depend_on_the_order():
    everything = [
        shown(file, (file * 7 % 13) / 13, page=page) for file in range(90) for page in (0, 1)
    ]
    expected = most_urgent(everything)
    assert len(expected) == 100
    kept = []
    for one in reversed(everything):
        kept = most_urgent([*kept, one])
    assert kept == expected


@pytest.mark.parametrize("count", [0, 1, 5, 31, 1000, 12_345])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_portions_are_all_files_once(count, size):
    parts = list(portions(count, size))
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert all(1 <= number <= 32 for number in sizes) and sizes == sorted(sizes, reverse=True)
    assert not sizes or sizes[-1] == 1


# ------------------------------------------------------------------------------------ which files


def test_files_folders_patterns_and_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.PNG", "b/1.jpg", "b/c/3.tiff", "b/.4.png", "b/.h/5.png", "b/note.txt",
                 "b/__MACOSX/6.png", "b/.DS_Store", "d.png"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    odd = os.fsdecode(b"b/\xff.png")
    Path(odd).touch()
    inside = ["b/1.jpg", "b/2.PNG", "b/c/3.tiff", odd]
    assert find_photos([Path("b")]) == inside
    assert find_photos([Path("d.png"), Path("b"), Path("b/1.jpg")]) == ["d.png", *inside]
    assert find_photos([Path("b/*.PNG"), Path("**/*.jpg")]) == ["b/2.PNG", "b/1.jpg"]
    assert find_photos([Path("b/*")]) == inside
    Path("lines").write_bytes(b"d.png\nb/\xff.png\r\n\nb/c\n")
    assert find_photos([], Path("lines")) == ["d.png", odd, "b/c/3.tiff"]
    Path("nuls").write_bytes(b"./d.png\0b/1.jpg\0")
    assert find_photos([], Path("nuls")) == ["d.png", "b/1.jpg"]
    Path("nothing").mkdir()
    lost = ["a [1].png", "*.png", "x" * 300]  # in a list, none is a pattern; rows say why
    Path("lost").write_text("\n".join(["nothing", *lost, "d.png"]))
    assert find_photos([], Path("lost")) == [*lost, "d.png"]
    assert find_photos([Path("x" * 300)]) == ["x" * 300]
    Path("only").write_text("nothing\n")
    Path("link.png").symlink_to("d.png")
    assert find_photos([Path("link.png"), Path("d.png")]) == ["link.png"]
    assert find_photos([Path("none.png")]) == ["none.png"]  # a row says why
    Path("[1].png").touch()
    assert find_photos([Path("[1].png")]) == ["[1].png"]
    Path("blank").touch()
    for named, listed, message in (
        ([Path("*.gif")], None, "*.gif: no image files in it"),
        ([Path("nothing")], None, "nothing: no image files in it"),
        ([], Path("only"), "--files-from only: no image files in it"),
        ([], Path("blank"), "--files-from blank: expected a path on each line"),
        ([], Path("none"), "--files-from none: No such file"),
    ):
        with pytest.raises(InputError) as caught:
            find_photos(named, listed)
        assert str(caught.value).startswith(message)


def test_what_tells_photos_apart_is_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert subject_of(["a", "b"]) == subject_of([str(tmp_path / "a"), "./b"])
    assert len({subject_of(["a", "b"]), subject_of(["b", "a"]), subject_of(["ab"])}) == 3


# ------------------------------------------------------------------------------------- the files


def number(text, box, confidence):
    digits = [
        {"value": int(c), "confidence": confidence, "status": "accepted", "box": box} for c in text
    ]
    return {
        "text": text,
        "confidence": confidence,
        "status": "accepted",
        "box": box,
        "digits": digits,
    }


def page(*lines, size=(200, 100)):
    return {
        "turned": 0,
        "inverted": False,
        "size": list(size),
        "warnings": [],
        "lines": list(lines),
        "others": [],
    }


def test_hocr_by_an_xml_parser(tmp_path):
    name = 'a "b" <&> \\ \udcff.png'
    pages = [
        page([number("12", [3.4, 5, 20, 10.2], 0.987), number("3", [40, 5, 9, 10], 0.5)]),
        page(),
    ]
    found = [
        {"file": name, "pages": pages, "error": None},
        {"file": "broken", "pages": [], "error": "why"},
        {
            "file": "c.png",
            "pages": [page([number("0", [0, 0, 8, 9], 1)], size=(8, 9))],
            "error": None,
        },
    ]
    path = tmp_path / "readings.hocr"
    with path.open("w", encoding="utf-8") as file:
        write_hocr(file, found)
    space = "{http://www.w3.org/1999/xhtml}"
    root = ElementTree.parse(path).getroot()
    metas = {one.get("name"): one.get("content") for one in root.iter(f"{space}meta")}
    assert metas["ocr-system"].startswith("mnist-ocr ") and "ocrx_word" in metas["ocr-capabilities"]
    divs = list(root.iter(f"{space}div"))
    assert [div.get("class") for div in divs] == ["ocr_page"] * 3
    title = divs[0].get("title")
    assert title == 'image "a %22b%22 <&> %5C %FF.png"; bbox 0 0 200 100; ppageno 0'
    assert divs[1].get("title").endswith("ppageno 1")
    spans = [(s.get("class"), s.get("title"), s.text) for s in root.iter(f"{space}span")]
    assert spans == [
        ("ocr_line", "bbox 3 5 49 16", None),
        ("ocrx_word", "bbox 3 5 24 16; x_wconf 99; x_confs 99 99", "12"),
        ("ocrx_word", "bbox 40 5 49 15; x_wconf 50; x_confs 50", "3"),
        ("ocr_line", "bbox 0 0 8 9", None),
        ("ocrx_word", "bbox 0 0 8 9; x_wconf 100; x_confs 100", "0"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the validator's own code
        from hocr_spec import HocrValidator

        report = HocrValidator("standard").validate(str(path))
    assert report.is_valid(), report.format("text")
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(ids) == len(set(ids)) == 10


def test_the_page_has_a_limit():
    picture = "data:image/jpeg;base64," + "A" * 600_000
    kept = [Shown(n, 0, 1 - n / 100, "s", picture, ["data:," + "B" * 900] * 400) for n in range(40)]
    one = page(*[[number("1" * 40, [0, 0, 9, 9], 0.5)] for _ in range(10)])
    found = {n: {"file": f"{n}.png", "pages": [one]} for n in range(40)}
    counts = dict.fromkeys(
        ("files", "files_read", "files_without", "numbers", "accepted", "doubtful", "rejected",
         "digits", "digits_accepted"), 100
    )  # fmt: skip
    report = {
        "title": "t", "warnings": [], "counts": counts | {"files_error": 5000}, "scores": None,
        "errors": [{"file": f"{n} {'x' * 200}", "error": "why" * 50} for n in range(1000)],
        "model": {"path": "m", "threshold": 0.9},
    }  # fmt: skip
    source = render_page(report, found, kept)
    assert MOST_BYTES / 2 < len(source.encode()) < MOST_BYTES < 20e6
    assert "0.png" in source and "39.png" not in source
    assert source.count("<tr>") == 200 and "and 4800 more" in source


# --------------------------------------------------------------------------------------- the job


@pytest.fixture(scope="module")
def model_file(with_doubt):
    """What matters here is not how well it reads."""
    return with_doubt(temperature=1.0, threshold=0.9)


@pytest.fixture(scope="module")
def photos(data_dir, tmp_path_factory):
    """120 small photos and some that are damaged in all the ways that people have found."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(120):
        ink = ink_of(data_dir, [f"{n * n * 7919 % 10_000}"], height=36, seed=n)
        made = Image.fromarray(on_paper(ink, seed=n))
        made.save(folder / f"{n:03}.{('png', 'jpg')[n % 2]}")
    png, jpg = (folder / "000.png").read_bytes(), (folder / "001.jpg").read_bytes()
    damaged = {
        "empty.jpg": b"",
        "half.jpg": jpg[: len(jpg) // 2],
        "half.png": png[: len(png) // 2],
        "header.png": png[:30],
        "text.png": b"hello\n",
        "page.jpg": b"<html>404</html>",
        "noise.webp": np.random.default_rng(0).bytes(3000),
        "zeros.bmp": b"BM" + bytes(100),
        "huge.pgm": b"P5 100000 100000 255\n" + bytes(100),
    }
    for name, content in damaged.items():
        (folder / f"x {name}").write_bytes(content)
    Image.fromarray(np.zeros((20, 20), np.float32)).save(folder / "x float.tif")
    two = [Image.new("L", (20, 20), level) for level in (0, 255)]
    two[0].save(folder / "x moving.gif", save_all=True, append_images=two[1:])
    (folder / "x lost.png").symlink_to("nowhere")
    os.mkfifo(folder / "x pipe.png")
    return folder


def words(world, *options):
    launch = [sys.executable, "-P", "-m", "mnist.launch", ROOT / "jobs/read.py"]
    return list(map(str, [*launch, "--processes", world, *options, "--threads", 1]))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def alone(model_file, photos, tmp_path_factory):
    """The readings of one process that nobody disturbed."""
    output = tmp_path_factory.mktemp("alone")
    command = words(1, "--model", model_file, photos, "--output-dir", output, "--hocr")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_damaged_files_are_rows(alone, photos):
    output, said = alone
    assert "read        120 of 133 files" in said and f"{'':11} and 8 more" in said
    with (output / "readings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors = {Path(r["file"]).name[2:]: r["message"] for r in rows if r["status"] == "error"}
    assert len(errors) == 13 and all(errors.values())
    assert errors["empty.jpg"].endswith("it is empty")
    assert errors["pipe.png"].endswith("it is not a file")
    assert "200 megapixels" in errors["huge.pgm"] and "No such file" in errors["lost.png"]
    assert not any(str(photos) in message for message in errors.values())
    report = json.loads((output / "readings.json").read_text())
    assert report["counts"]["files"] == len(report["files_sha256"]) == 133
    assert report["files_sha256"][f"{photos}/000.png"] == record(photos / "000.png")["sha256"]
    ElementTree.parse(output / "readings.hocr")
    assert {p.name for p in output.iterdir()} == {*FILES, "readings.json", "readings.hocr"}


def test_killed_or_stopped_in_any_world_it_ends_with_the_same_bytes(
    alone, model_file, photos, tmp_path
):
    output = tmp_path / "out"
    options = ["--model", model_file, photos, "--output-dir", output]
    said = []
    for world, number in ((1, signal.SIGKILL), (3, signal.SIGTERM)):
        process = subprocess.Popen(
            words(world, *options), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        before, end = written(output), time.monotonic() + 60
        while written(output) < before + 5 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said.append(process.communicate(timeout=60)[0])
    assert process.returncode == 75
    assert "files are read; the same command again goes on" in said[-1]
    assert 10 <= written(output) < 133 and not (output / "readings.csv").exists()
    done = subprocess.run(words(2, *options), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for one in (said[-1], done.stdout):
        assert "goes on: " in one and "files have been read" in one
    assert contents(output) == contents(alone[0])
    assert {path.name for path in output.iterdir()} == {*FILES, "readings.json"}
    reports = [json.loads((o / "readings.json").read_text()) for o in (output, alone[0])]
    for report in reports:
        for name in ("throughput", "time", "world_size"):
            del report[name]
    assert reports[0] == reports[1]


def written(output):
    """How many files have a record."""
    parts = output.glob(".unfinished-*/*.records")
    return sum(part.read_bytes().count(b"\n") for part in parts)


@pytest.mark.timeout(200)
def test_wandb_gets_counts_and_photos_only_if_asked(fast_run, photos, tmp_path):
    whole = tmp_path / "run"
    shutil.copytree(fast_run, whole)
    environment = os.environ | {"WANDB_MODE": "offline"}
    for options in ([], ["--wandb-photos"]):
        command = words(1, "--run", whole, photos / "000.png", *options)
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
        assert done.returncode == 0, done.stderr
        log = logs(whole)[-1]
        summary = {}
        for one in records(log, "summary"):
            summary |= one["update"]
        assert summary["readings/000/files_read"] == 1
        assert bool(list(log.parent.glob("files/media/**/*.html"))) == bool(options)


@pytest.fixture
def reader(with_doubt, files, tmp_path, monkeypatch):
    """Reads files, pages of which are texts, 5 of them at once, as a process would."""
    monkeypatch.setattr(work, "_SECONDS_AT_STAKE", -1)
    loaded = []

    def load_pages(path, first=0):
        for text in path.read_text().split()[first:]:
            loaded.append(text)
            yield Frame(np.full((2, 2), 255, np.uint8), (2, 2))

    monkeypatch.setattr(work, "load_pages", load_pages)
    model = load_model(with_doubt(temperature=1.0, threshold=0.9))
    journal = Journal.begin(tmp_path / "out", files, {})

    def read(start, places, stop=None):
        loaded.clear()
        world = World(precision=torch.bfloat16)  # pages stay alone
        with closing(journal.index()) as index:
            _, pictures = journal.remaining(index)
            one = work._Reader(model, world, files, index, pictures)
            with closing(Writer(journal.folder, start, 0)) as writer:
                for records in one.read(places, stop or StopRequest()):
                    writer.add(records, one.fresh())
        with closing(journal.index()) as index:
            return [index.record(place) for place in places if index.has(place)]

    return read, loaded


def test_touched_files_are_not_read_again(reader, files):
    read, loaded = reader
    for path in files:
        Path(path).write_text(f"{path} " * 30)
    before = read(1, range(7))
    assert len(loaded) == 210 and all(len(one["pages"]) == 30 for one in before)
    for path in files:
        os.utime(path, (5, 5))
    Path(files[6]).write_text("another")
    after = read(2, range(7))
    # Of what is touched so much is read that there are pictures of all that may be shown.
    assert loaded == [path for path in files[:4] for _ in range(30)] + ["another"]
    assert len(after[6]["pages"]) == 1
    for old, new, path in zip(before[:6], after, files, strict=False):
        assert new == old | {"stat": stat_of(path)} != old


def test_long_files_go_on_in_the_middle(reader, files):
    read, loaded = reader
    Path(files[2]).write_text("a b c d e f")

    class Stop:
        @property
        def requested(self):
            return len(loaded) == 4

    (part,) = read(1, [2], Stop())
    assert loaded == ["a", "b", "c", "d"] and part["unfinished"] and len(part["pages"]) == 4
    (whole,) = read(2, [2])
    assert loaded == ["e", "f"] and not whole["unfinished"] and len(whole["pages"]) == 6
    Path(files[3]).write_text("a b c d e")
    assert read(3, [3], Stop())[0]["unfinished"]
    Path(files[3]).write_text("A B C D E")
    assert len(read(4, [3])[0]["pages"]) == 5 and loaded == list("ABCDE")


def test_what_could_not_be_opened_is_tried_again(reader, files, monkeypatch):
    read, _ = reader

    def refuse(path):
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(work, "sha256", refuse)
        (record,) = read(1, [0])
    assert record["error"] == "cannot be read as an image: input/output error"
    assert record["stat"] != stat_of(files[0])
    Path(files[1]).write_text("")
    (record,) = read(2, [1])
    assert record["error"].endswith("it is empty") and record["stat"] == stat_of(files[1])


# ------------------------------------------------------------------------------------ the folder


@pytest.fixture
def run(capfd):
    """Reads in this process: what it says, or the InputError."""

    def run(*options):
        read(parse_read_config([*map(str, options), "--threads", "1"]))
        return capfd.readouterr().out

    return run


def test_complete_readings_are_left_alone(run, model_file, photos, tmp_path, monkeypatch):
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("000.png", "001.jpg", "002.png"):
        shutil.copy(photos / name, folder)
    options = ["--model", model_file, folder, "--output-dir", output]
    first = run(*options)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert (
        run(*options) == f"{output} is complete; without it, the same command reads again\n{first}"
    )
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    shutil.copy(photos / "003.jpg", folder / "002.png")
    assert "is complete" not in run(*options)
    assert "is complete" not in run(*options, "--hocr")
    assert {path.name for path in output.iterdir()} == {*FILES, "readings.json", "readings.hocr"}
    assert "is complete" in run(*options, "--hocr")
    (output / "readings.html").unlink()
    assert "is complete" not in run(*options)
    assert "is complete" in run(*options)
    assert "is complete" not in run("--model", model_file, f"{folder}/*", "--output-dir", output)
    assert "Readings of *" in (output / "readings.html").read_text()
    monkeypatch.setattr(job, "source_digest", lambda: "another version")
    assert "is complete" not in run("--model", model_file, f"{folder}/*", "--output-dir", output)
    assert {path.name for path in output.iterdir()} == {*FILES, "readings.json"}


def test_what_others_have_put_there_stays(run, model_file, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_LOCK_SECONDS", 0.1)
    options = ["--model", model_file, photos / "000.png", "--output-dir"]
    (tmp_path / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/readings.hocr").write_text("<html>mine</html>")
    (tmp_path / "busy").mkdir()
    (tmp_path / "csv/readings.csv").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "again").symlink_to("busy")
    for name, reason in (
        ("csv", "has a readings.csv of other origin"),
        ("loop", "File exists"),
        ("x" * 300, "File name too long"),
        ("again", "is in use by another process"),
        ("file", "is not a folder; take another --output-dir"),
        ("file/out", "Not a directory"),
        ("out", "has a readings.hocr of other origin; take another --output-dir"),
        ("busy", "is in use by another process; wait for its end, or take another --output-dir"),
    ):
        with FileLock(tmp_path / "busy/.lock"), pytest.raises(InputError, match=reason):
            run(*options, tmp_path / name, "--hocr")
    assert (tmp_path / "out/readings.hocr").read_text() == "<html>mine</html>"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["readings.hocr"]
    assert not list((tmp_path / "busy").glob("readings*"))


def test_one_killed_while_its_files_were_moved_is_not_complete(
    run, model_file, with_doubt, photos, tmp_path, monkeypatch
):
    other = with_doubt(temperature=2.0, threshold=0.5)
    shutil.copy(model_file, tmp_path / "model.safetensors")
    first, second = (
        ["--model", model, photos / "000.png", "--output-dir", tmp_path / "out"]
        for model in (tmp_path / "model.safetensors", other)
    )
    run(*first)
    before = contents(tmp_path / "out")
    replace = Path.replace

    def kill(path, target):
        if path.name == "readings.json":
            raise SystemExit(137)
        return replace(path, target)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", kill)
        with pytest.raises(SystemExit):
            run(*second)
    assert contents(tmp_path / "out") != before
    assert "is complete" not in run(*first)
    assert contents(tmp_path / "out") == before


def test_paths_without_an_end_are_rows(run, model_file, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop.png").symlink_to("loop.png")
    Path("linked").symlink_to("deep/er")
    Path("deep/er").mkdir(parents=True)
    shutil.copy(photos / "000.png", "deep")
    Path("list").write_text("loop.png\n./linked/../000.png\n")
    Path("truth.csv").write_text("file,truth\nloop.png,1\nlinked/../000.png,0\n")
    options = ["--model", model_file, "--files-from", "list", "--truth", "truth.csv"]
    said = run(*options, "--output-dir", "out")
    assert "read        1 of 2 files" in said and "Too many levels of symbolic links" in said
    with pytest.raises(InputError, match="Too many levels"):
        run("--model", model_file, "loop.png")
    with pytest.raises(InputError, match="none of 2 files"):
        run("--model", model_file, "loop.png", "none.png", "--output-dir", "nothing")
    assert not Path("nothing").exists()


def test_begun_by_another_version_it_is_read_again(run, model_file, photos, tmp_path, monkeypatch):
    options = ["--model", model_file, photos / "000.png", photos / "002.png"]
    options += ["--output-dir", tmp_path]
    requests = iter([False, False, False])

    class Stop(StopRequest):
        requested = property(lambda self: next(requests, True), lambda self, value: None)

    with monkeypatch.context() as stopped:
        stopped.setattr(job, "StopRequest", Stop)
        with pytest.raises(SystemExit):
            run(*options)
    assert written(tmp_path) == 1
    with monkeypatch.context() as changed:
        changed.setattr(job, "source_digest", lambda: "another version")
        assert "goes on: 1 of 2 files" in run(*options)
        assert "is complete" not in run(*options)
        assert "is complete" in run(*options)
