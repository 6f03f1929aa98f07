"""Settings of a reading, and how a command line makes them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mnist.cli import InputError, as_typed, parse_options, require_processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """Read the numbers that people have written, on photos and scans.

    Writes readings.csv, readings.json and readings.html.
    """

    photos: Positional[tuple[Path, ...]] = ()
    """Image files, of any size and look, folders of them, and patterns such as 'scans/*.png'."""
    files_from: Path | None = None
    """A file that lists photos, one on each line, or each ended by a NUL byte."""
    run: Path | None = None
    """Run folder: its final model or, of an unfinished run, its newest good checkpoint."""
    model: Path | None = None
    """Model file (.safetensors), instead of --run."""
    truth: Path | None = None
    """What is written there, to be scored: a CSV with the columns file (relative to it) and truth
    (a slash between lines, a space between numbers)."""
    output_dir: Path | None = None
    """Where the files go; by default readings/ beside the model, with a folder per input."""
    hocr: bool = False
    """Write readings.hocr as well: pages, lines and numbers for programs that read hOCR."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the matrix products; auto: the launcher's, else bf16 where it is native."""
    threads: int | None = None
    """CPU threads per process; by default all cores this process may use, shared by the
    processes of a machine."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Whether the run there gets counts and scores; auto: WANDB_MODE, else online if a key is
    configured, else offline, in the run's folder. Of a finished --run only."""
    wandb_photos: bool = False
    """Send readings.html there as well, which shows the photos."""
    expect_world_size: int | None = None
    """Stop unless exactly this many processes read together."""

    def __post_init__(self) -> None:
        require_processes(self)

    def check(self) -> None:
        """Raise an InputError if the options do not say, once, what is to be read by what."""
        if self.run is None and self.model is None:
            raise InputError(
                "give --run FOLDER or --model FILE; scripts/train --recipe reader makes a reader"
            )
        if self.run is not None and self.model is not None:
            raise InputError("give one of --run FOLDER or --model FILE")
        if not self.photos and self.files_from is None:
            raise InputError("name the photos to read: files, or folders of them")


def parse_read_config(arguments: Sequence[str]) -> ReadConfig:
    """Settings of a reading from the command line.

    Raises:
        InputError: an unknown option, a wrong type, a value out of range, or a contradiction.
    """
    config = parse_options(as_typed(arguments, ReadConfig), ReadConfig(), "read.py")
    config.check()
    return config
