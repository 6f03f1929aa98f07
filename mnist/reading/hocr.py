"""``readings.hocr``: what was read, in the format that programs for text on pages exchange.

hOCR 1.2 (kba.github.io/hocr-spec/1.2): XHTML of pages, lines and words with their boxes. A word is
a number; its digits are what was read, doubtful or not, each with its confidence.
"""

import math
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

SYSTEM = "mnist-ocr"
"""What the file says that it was made by."""

_HEAD = f"""\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
    "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
<head>
<title>Readings</title>
<meta http-equiv="Content-Type" content="text/html;charset=utf-8"/>
<meta name="ocr-system" content="{SYSTEM} {version(SYSTEM)}"/>
<meta name="ocr-capabilities" content="ocr_page ocr_par ocr_line ocrx_word"/>
</head>
<body>
"""
_FOOT = "</body>\n</html>\n"
_PLAIN = "".join(map(chr, range(33, 127))).translate({ord(c): None for c in '%;"\\'}) + " "


def write_hocr(target: IO[str], records: Iterable[dict[str, Any]]) -> None:
    """All pages of all files, in order; files that could not be read have none."""
    target.write(_HEAD)
    pages = ((record["file"], page) for record in records for page in record["pages"])
    for number, (file, page) in enumerate(pages):
        target.writelines(_page(file, page, number))
    target.write(_FOOT)


def is_hocr(path: Path) -> bool:
    """Whether a file is one of these."""
    try:
        with path.open("rb") as file:
            return f'content="{SYSTEM} '.encode() in file.read(1000)
    except OSError:
        return False


def _page(file: str, page: dict[str, Any], number: int) -> Iterator[str]:
    name = quote(os.fsencode(file), safe=_PLAIN)  # readers part a title at any semicolon
    size = page["size"]
    title = f'image "{name}"; bbox 0 0 {size[0]} {size[1]}; ppageno {number}'
    yield f'<div class="ocr_page" id="page_{number + 1}" title={quoteattr(title)}>\n'
    for at, line in enumerate(page["lines"], 1):
        around, place = _around([n["box"] for n in line], size), f"{number + 1}_{at}"
        yield f'<p class="ocr_par" id="par_{place}" title="{around}">'
        yield f'<span class="ocr_line" id="line_{place}" title="{around}">'
        for which, found in enumerate(line, 1):
            text = "".join(str(digit["value"]) for digit in found["digits"])
            each = " ".join(f"{100 * digit['confidence']:.0f}" for digit in found["digits"])
            sure = f"x_wconf {100 * found['confidence']:.0f}; x_confs {each}"
            yield (
                f'<span class="ocrx_word" id="word_{place}_{which}" '
                f'title="{_around([found["box"]], size)}; {sure}">{escape(text)}</span> '
            )
        yield "</span></p>\n"
    yield "</div>\n"


def _around(boxes: list[list[float]], size: list[int]) -> str:
    """What surrounds some of left, top, width and height, in whole pixels of a page of this width
    and height."""
    left, top = (max(0, int(min(box[side] for box in boxes))) for side in (0, 1))
    right, bottom = (
        min(size[side], math.ceil(max(box[side] + box[side + 2] for box in boxes)))
        for side in (0, 1)
    )
    return f"bbox {left} {top} {right} {bottom}"
