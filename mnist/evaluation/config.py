"""Settings of an evaluation, and how a command line makes them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mnist.cli import InputError, as_typed, parse_options, require, require_processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on images, MNIST's or your own, and report how good it is.

    Writes predictions.csv, report.json and report.html.
    """

    run: Path | None = None
    """Run folder: its final model or, of an unfinished run, its newest good checkpoint."""
    model: Path | None = None
    """Model file (.safetensors), instead of --run."""
    split: Literal["test", "validation", "train"] | None = None
    """Images of MNIST, by default test; validation is what the run held out of the training
    images, train is the rest, which it learned."""
    images: Path | None = None
    """Images of your own, one digit each, of any size and look: a folder of image files, in
    sub-folders 0 to 9 where their labels are known, an IDX file (also .gz), or a .npy of
    Nxheightxwidth (uint8, or floats of 0 to 1)."""
    labels: Path | None = None
    """Their labels, 0 to 9: an IDX file (also .gz) or a .npy of N, in the images' order; or for a
    folder a CSV with the columns file and label, a row for each image."""
    prepare: Literal["auto", "as-is", "mnist"] = "auto"
    """What is done to --images: auto leaves those that look like MNIST's as they are, and makes the
    others so; mnist makes all so; as-is takes 28x28 as they are, light ink on a dark ground."""
    output_dir: Path | None = None
    """Where the files go; by default evaluation/ beside the model, with a folder per split."""
    batch_size: int = 1024
    """Images scored at once by each process."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the matrix products; auto: the launcher's, else bf16 where it is native."""
    data_dir: Path = Path(os.environ.get("MNIST_DATA_DIR") or "data")
    """MNIST in torchvision's layout, fetched if missing (environment: MNIST_DATA_DIR)."""
    threads: int | None = None
    """CPU threads per process; by default all cores this process may use, shared by the
    processes of a machine."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Whether the run there gets a copy; auto: WANDB_MODE, else online if a key is configured, else
    offline, in the run's folder. Of a finished --run only, at its place there."""
    expect_world_size: int | None = None
    """Stop unless exactly this many processes score together."""

    def __post_init__(self) -> None:
        require(self, 1 <= self.batch_size <= 1_000_000, "batch_size", "1 to 1000000")
        require_processes(self)

    def check(self) -> None:
        """Raise an InputError if the options do not say, once, what is to be evaluated."""
        if (self.run is None) == (self.model is None):
            raise InputError("give one of --run FOLDER or --model FILE")
        if self.images is not None and self.split is not None:
            raise InputError("--split chooses images of MNIST, --images are your own: give one")
        if self.labels is not None and self.images is None:
            raise InputError("--labels takes --images; MNIST brings its own")
        if self.prepare != "auto" and self.images is None:
            raise InputError("--prepare takes --images; MNIST's stay as they are")
        if self.run is None and self.split in ("validation", "train"):
            raise InputError(
                f"--split {self.split} takes --run: every run has its own validation split"
            )


def parse_evaluate_config(arguments: Sequence[str]) -> EvaluateConfig:
    """Settings of an evaluation from the command line.

    Raises:
        InputError: an unknown option, a wrong type, a value out of range, or a contradiction.
    """
    config = parse_options(as_typed(arguments, EvaluateConfig), EvaluateConfig(), "evaluate.py")
    config.check()
    return config
