"""``readings.hocr``: what was read, in the format that programs for text on pages exchange.

hOCR 1.2 (kba.github.io/hocr-spec/1.2): XHTML of pages, lines and words with their boxes. A word is
a number; its digits are what was read, doubtful or not, each with its confidence.
"""

import re
from collections.abc import Iterable, Iterator
from typing import IO, Any
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
<meta name="ocr-system" content="{SYSTEM}"/>
<meta name="ocr-capabilities" content="ocr_page ocr_line ocrx_word ocrp_wconf"/>
</head>
<body>
"""
_FOOT = "</body>\n</html>\n"
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def write_hocr(target: IO[str], records: Iterable[dict[str, Any]]) -> None:
    """All pages of all files, in order; files that could not be read have none."""
    target.write(_HEAD)
    number = 0
    for record in records:
        for place, page in enumerate(record["pages"]):
            target.writelines(_page(record["file"], place, page, number))
            number += 1
    target.write(_FOOT)


def _page(file: str, place: int, page: dict[str, Any], number: int) -> Iterator[str]:
    name = _NO_XML.sub("\ufffd", file).replace("\\", "\\\\").replace('"', '\\"')
    width, height = page["size"]
    title = f'image "{name}"; bbox 0 0 {width} {height}; ppageno {place}'
    yield f'<div class="ocr_page" id="page_{number + 1}" title={quoteattr(title)}>\n'
    for at, line in enumerate(page["lines"], 1):
        around = _around([n["box"] for n in line])
        yield f'<span class="ocr_line" id="line_{number + 1}_{at}" title="{around}">'
        for which, found in enumerate(line, 1):
            text = "".join(str(digit["value"]) for digit in found["digits"])
            each = " ".join(f"{100 * digit['confidence']:.0f}" for digit in found["digits"])
            sure = f"x_wconf {100 * found['confidence']:.0f}; x_confs {each}"
            yield (
                f'<span class="ocrx_word" id="word_{number + 1}_{at}_{which}" '
                f'title="{_around([found["box"]])}; {sure}">{escape(text)}</span> '
            )
        yield "</span>\n"
    yield "</div>\n"


def _around(boxes: list[list[float]]) -> str:
    """The box around some of left, top, width and height, in whole pixels."""
    left, top = (min(box[side] for box in boxes) for side in (0, 1))
    right, bottom = (max(box[side] + box[side + 2] for box in boxes) for side in (0, 1))
    return f"bbox {int(left)} {int(top)} {round(right + 0.5)} {round(bottom + 0.5)}"
