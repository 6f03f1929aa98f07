"""Ink of pages: ground, shadows, colours, rules, polarity."""

import numpy as np
import pytest
from made_pages import ink_of, on_paper
from PIL import Image, ImageDraw

from mnist.reading.ink import find_ink


@pytest.fixture(scope="module")
def ink(data_dir):
    return ink_of(data_dir, ["31415", "92653"])


def overlap(found, ink):
    """Intersection over union of the mask and what was written, edges aside."""
    inner, outer = ink > 0.7, ink > 0.15
    return (found & inner).sum() / inner.sum(), (found & ~outer).sum() / max(1, found.sum())


def check(page, ink, least=0.95, most=0.02):
    found = find_ink(page)
    kept, foreign = overlap(found.mask, ink)
    assert kept > least and foreign < most
    return found


def test_plain_page(ink):
    found = check(on_paper(ink), ink)
    assert not found.inverted and not found.rules.any()


def test_light_on_dark(ink):
    assert check(255 - on_paper(ink), ink).inverted


def test_shadow_and_light_that_falls_off(ink):
    height, width = ink.shape
    light = np.linspace(1, 0.5, width)[None] * np.ones((height, 1))
    light[:, width // 2 :] *= 0.6
    page = on_paper(ink) * light
    check(page.round().astype(np.uint8), ink, least=0.9, most=0.05)


@pytest.mark.parametrize("pen", [(30, 60, 170), (190, 30, 40), (20, 120, 60)])
def test_coloured_pens_on_yellow_paper(ink, pen):
    paper = np.array([236, 226, 190.0])
    page = paper + (np.array(pen) - paper) * ink[..., None]
    page += np.random.default_rng(0).normal(0, 2, page.shape)
    check(page.clip(0, 255).round().astype(np.uint8), ink)


def test_two_pens_on_one_page(ink):
    paper, half = np.array([240, 240, 240.0]), ink.shape[0] // 2
    page = paper + (np.array([20, 40, 200]) - paper) * ink[..., None]
    page[half:] = (paper + (np.array([220, 40, 20]) - paper) * ink[..., None])[half:]
    check(page.clip(0, 255).round().astype(np.uint8), ink)


@pytest.mark.parametrize("slope", [0.0, 0.03, -0.05])
def test_rules_are_left_out_and_digits_are_not_cut(ink, slope):
    page, rules = on_paper(ink), np.zeros(ink.shape, bool)
    place = np.arange(ink.shape[1])
    for row in range(20, ink.shape[0] - 20, 45):
        y = np.rint(row + slope * place).astype(int)
        for thick in (0, 1):
            inside = (y + thick >= 0) & (y + thick < ink.shape[0])
            rules[(y + thick)[inside], place[inside]] = True
    page[rules & (ink < 0.5)] = 110
    found = find_ink(page)
    alone = rules & (ink < 0.05)
    assert (found.mask & alone).sum() < 0.1 * alone.sum()
    assert (found.mask & (ink > 0.7)).sum() > 0.9 * (ink > 0.7).sum()


@pytest.mark.parametrize(("margin", "thick"), [(0, 3), (60, 3), (60, 6)])
def test_grid_is_left_out(data_dir, margin, thick):
    ink = np.pad(ink_of(data_dir, ["1 2 3", "4 5 6"], leading=3), margin)
    page = on_paper(ink)
    lines = np.zeros(ink.shape, bool)
    for aside in range(thick):
        lines[aside::80] = lines[:, 3 + aside :: 90] = True
    lines &= np.pad(np.ones([side - 2 * margin for side in ink.shape], bool), margin)
    page[lines] = 60
    found = find_ink(page)
    alone = lines & (ink < 0.05)
    assert (found.mask & alone).sum() < 0.05 * alone.sum()


def drawn(size, draw):
    """What ``draw`` draws on a crop, 0 to 1, drawn four times as large and reduced."""
    image = Image.new("L", (4 * size[0], 4 * size[1]))
    draw(ImageDraw.Draw(image))
    return np.asarray(image.resize(size, Image.Resampling.BOX)).astype(float) / 255


def test_zeros_that_are_joined_are_no_rule():
    def draw(pen):
        for left, low in zip(range(100, 1000, 190), (176, 182, 178, 184, 179), strict=True):
            pen.rounded_rectangle((left, 60, left + 200, low), 55, outline=255, width=16)

    ink = drawn((310, 56), draw)
    assert not check(on_paper(ink), ink).rules.any()


def test_strokes_as_high_as_a_crop_are_no_rules():
    def draw(pen):
        for left in (100, 200, 300):
            pen.line((left + 30, 14, left, 210), fill=255, width=18)
        pen.ellipse((400, 60, 520, 200), outline=255, width=18)

    ink = drawn((160, 56), draw)
    assert not check(on_paper(ink), ink).rules.any()


def test_a_rule_on_which_digits_stand_close_together():
    def digits(pen):
        for left in range(30, 600, 75):
            pen.line((left, 40, left + 40, 40, left + 10, 178), fill=255, width=20)
            pen.arc((left - 10, 110, left + 50, 188), -90, 120, fill=255, width=20)

    ink = drawn((160, 60), digits)
    page = on_paper(ink)
    rule = np.zeros(ink.shape, bool)
    rule[45:47] = True
    page[rule & (ink < 0.5)] = 90
    found = find_ink(page)
    alone = rule & (ink < 0.05)
    assert (found.mask & alone).sum() < 0.1 * alone.sum()
    above = (ink > 0.7) & (np.arange(60) < 41)[:, None]
    assert (found.mask & above).sum() > 0.95 * above.sum()


@pytest.mark.parametrize("kind", ["even", "noisy", "shadow"])
def test_an_empty_page_has_no_ink(kind):
    page = np.full((300, 400), 200.0)
    if kind == "noisy":
        page += np.random.default_rng(0).normal(0, 8, page.shape)
    if kind == "shadow":
        page *= 1 / (1 + np.exp((np.arange(400) - 200) / 25)) * 0.5 + 0.5
        page += np.random.default_rng(0).normal(0, 2, page.shape)
    found = find_ink(page.clip(0, 255).round().astype(np.uint8))
    assert found.mask.mean() < 0.001


@pytest.mark.parametrize("shape", [(1, 1), (640, 1), (1, 1001), (640, 2), (3, 900), (2, 2, 3)])
def test_pages_that_are_nearly_lines(shape):
    page = np.full(shape, 200, np.uint8)
    page[: shape[0] // 2] = 30
    height, width = find_ink(page).mask.shape
    assert (height, width) in (shape[:2], (2 * shape[0], 2 * shape[1]))  # fine strokes are enlarged
