"""HEIC and PDF, by their optional packages.

page.heic and turned.heic are the digits 42 drawn by a program; turned.heic lies on its side, and
says so as iPhones do.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mnist.cli import InputError
from mnist.evaluation.folders import decode_image
from mnist.reading.photo import LONGEST, find_photos, load_pages

HERE = Path(__file__).parent


@pytest.fixture
def drawn():
    page = Image.new("L", (600, 400), 255)
    font = ImageFont.load_default(260)
    ImageDraw.Draw(page).text((300, 200), "42", fill=0, font=font, anchor="mm")
    return page


@pytest.mark.parametrize("name", ["page.heic", "turned.heic"])
def test_photos_of_iphones_are_upright(drawn, name):
    ((pixels, size),) = load_pages(HERE / name)
    assert size == (600, 400) and pixels.shape[:2] == (400, 600)
    grey = pixels if pixels.ndim == 2 else pixels.mean(2)
    assert np.abs(grey - np.asarray(drawn, float)).mean() < 4
    assert (decode_image(HERE / name, any_size=True) == pixels).all()


def test_damaged_heic_is_one_line(tmp_path):
    (tmp_path / "half.HEIC").write_bytes((HERE / "page.heic").read_bytes()[:2000])
    (tmp_path / "text.heif").write_text("hello")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="cannot be read as an image: "):
            list(load_pages(path))


def test_every_page_of_a_pdf_is_a_page(drawn, tmp_path):
    path = tmp_path / "two.PDF"
    turned = drawn.transpose(Image.Transpose.ROTATE_90)
    drawn.save(path, "PDF", save_all=True, append_images=[turned], resolution=150)
    pages = list(load_pages(path))
    assert [page.size for page in pages] == [(2000, 1334), (1334, 2000)]
    assert [page.pixels.shape for page in pages] == [(1334, 2000), (2000, 1334)]
    assert max(pages[0].size) == LONGEST
    small = np.asarray(Image.fromarray(pages[0].pixels).resize((600, 400)))
    assert np.abs(small - np.asarray(drawn, float)).mean() < 4
    assert find_photos([tmp_path]) == [str(path)]


@pytest.mark.parametrize("name", ["three.pdf", "three.tif"])
def test_pages_from_one_in_the_middle_on(name, tmp_path):
    levels = [Image.new("L", (30, 20), 100 * number) for number in range(3)]
    levels[0].save(tmp_path / name, save_all=True, append_images=levels[1:])
    for first in range(5):
        found = [page.pixels.mean() for page in load_pages(tmp_path / name, first)]
        assert found == pytest.approx([0, 100, 200][first:], abs=2)


def test_pages_of_any_shape(tmp_path):
    for name, size in (("flat", (5000, 3)), ("dot", (1, 1)), ("large", (4000, 6000))):
        Image.new("1", size, 1).save(tmp_path / f"{name}.pdf", resolution=72)
        (page,) = load_pages(tmp_path / f"{name}.pdf")
        assert max(page.pixels.shape) <= LONGEST and page.pixels.min() == 255


def test_damaged_pdf_is_one_line(drawn, tmp_path):
    drawn.save(tmp_path / "whole.pdf")
    content = (tmp_path / "whole.pdf").read_bytes()
    for name, damaged in (("text", b"hello"), ("head", content[:400]), ("empty", b"")):
        (tmp_path / f"{name}.pdf").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as a PDF: "):
            list(load_pages(tmp_path / f"{name}.pdf"))


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("pillow_heif", "page.heic", "pillow-heif"), ("pypdfium2", "page.pdf", "pypdfium2")],
)
def test_without_the_package(monkeypatch, module, name, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"{name}: .* takes the package .*pip install {package}"):
        list(load_pages(HERE / name))
