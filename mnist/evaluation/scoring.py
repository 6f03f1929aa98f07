"""Scoring: every image exactly once, by any number of processes, and their findings together."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE, normalise, rank_slice
from mnist.distributed import World, widest_float
from mnist.evaluation.inputs import Inputs
from mnist.evaluation.preparation import WITHOUT_DIGIT, Prepared
from mnist.evaluation.report import (
    DISPUTED_TEST_LABELS,
    Example,
    Examples,
    Tally,
    candidates,
    csv_header,
    csv_rows,
)
from mnist.evaluation.suspicions import Suspicions, suspicion_warnings
from mnist.model import MLP
from mnist.pace import Pace
from mnist.system import shows_bars

# Processes exchange how far they are after so many batches: often enough for a progress display,
# and so that none waits for another longer than a collective may take.
_ROUND_BATCHES = 8
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(kw_only=True)
class Scores:
    """What all processes together found."""

    tally: Tally
    examples: Examples
    warnings: list[str]
    seconds: float


def most_at_once(inputs: Inputs) -> int:
    """How many images a process may prepare between two words with the others: a photo may take a
    second and megabytes."""
    if inputs.mode == "as-is":
        return len(inputs)
    small = inputs.files is None and inputs.image_rows.shape[1:] == IMAGE_SHAPE
    return 1024 if small else 16


def score(
    model: MLP, inputs: Inputs, world: World, batch_size: int, part: Path | None = None
) -> Scores:
    """Score every image once; every rank returns the sums over all of them.

    Each rank takes a contiguous share of whole batches, so that every image meets the same
    arithmetic in any world.

    Args:
        model: in any precision; it is moved to the world's.
        inputs: the same on every rank.
        world: the processes that share the work.
        batch_size: images at once, per process.
        part: where this rank writes its rows of ``predictions.csv``, rank 0 below the header.

    Raises:
        InputError: images are damaged, a row cannot be written, the model's output is no number.
    """
    batch_size = min(batch_size, most_at_once(inputs))
    prepares = inputs.mode != "as-is"  # which takes the time that it takes
    round_batches = 1 if prepares else _ROUND_BATCHES
    batches = math.ceil(len(inputs) / batch_size)
    share = range(batches)[rank_slice(batches, world.rank, world.size)]
    rounds = math.ceil(math.ceil(batches / world.size) / round_batches)  # of the largest share
    scorer = _Scorer(model.to(world.device, world.precision), inputs, world, part)
    sizes = {min(batch_size, len(inputs)), len(inputs) % batch_size} - {0}
    pace = Pace(
        world.threads if world.device.type == "cpu" else 1,
        lambda: [torch.from_numpy(predict(model, _noise(size), world)) for size in sizes],
    )
    with (
        closing(pace),
        scorer,
        progress(len(inputs), "images", "scored", shown=world.is_main) as show,
    ):
        world.from_all(scorer.open, prepares=True)
        for turn in range(rounds):

            def work(numbers: range = share[turn * round_batches :][:round_batches]) -> int:
                for number in numbers:
                    start, began = number * batch_size, time.perf_counter()
                    scorer.score(start, min(start + batch_size, len(inputs)))
                    pace.count(time.perf_counter() - began)
                return scorer.images

            show(sum(world.from_all(work, prepares=prepares or turn == 0)))
        world.from_all(scorer.close)
    scores = scorer.together()
    scored = int(scores.tally.treatments.sum())
    if scored != len(inputs):
        raise RuntimeError(f"scored {scored:,} of {len(inputs):,} images")
    return scores


class _Scorer:
    """One rank's part of the work."""

    def __init__(self, model: MLP, inputs: Inputs, world: World, part: Path | None) -> None:
        self.model, self.inputs, self.world, self.part = model, inputs, world, part
        self.tally, self.examples, self.suspicions = Tally(), Examples(), Suspicions()
        self.images = 0
        self._started = time.perf_counter()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "_Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.close()

    def open(self) -> None:
        """Begin this rank's part of ``predictions.csv``."""
        if self.part is not None:
            with self._writing():
                self._file = self.part.open("wb", 1 << 20)
                if self.world.is_main:
                    self._file.write(
                        csv_header(
                            self.inputs.files is not None, self.model.doubt is not None
                        ).encode()
                    )

    def close(self) -> None:
        """End it."""
        if self._file is not None:
            with self._writing():
                self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.part}: {error.strerror}; nothing was changed; --output-dir takes storage "
                "with enough space that all processes share"
            ) from None

    def score(self, start: int, stop: int) -> None:
        """Score the images from ``start`` to ``stop``."""
        prepared, labels = self.inputs.prepared(start, stop), self.inputs.labels(start, stop)
        images, indices = prepared.images, self.inputs.indices(start, stop)
        if self.inputs.mode == "as-is":
            self.suspicions.look(images, start)
        log_probabilities = predict(self.model, images, self.world)
        if not np.isfinite(log_probabilities).all():
            raise InputError(f"the model's output for images {start} to {stop - 1} is not finite")
        disputed = np.zeros(len(indices), bool)
        if self.inputs.is_mnist_test:
            disputed = np.isin(indices, DISPUTED_TEST_LABELS)
        accepts = None if self.model.doubt is None else self.model.doubt.threshold
        self.tally.add(labels, log_probabilities, disputed, prepared.treatments, accepts)
        probabilities = np.exp(log_probabilities)
        files = None if self.inputs.files is None else self.inputs.files[start:stop]
        if self._file is not None:
            found = prepared.treatments != WITHOUT_DIGIT
            rows = csv_rows(indices, labels, probabilities, files, found, accepts)
            with self._writing():
                self._file.write(rows)
        self._keep_examples(prepared, labels, indices, probabilities, files)
        self.images += stop - start

    def _keep_examples(
        self,
        prepared: Prepared,
        labels: NDArray[np.int64],
        indices: NDArray[np.int64],
        probabilities: NDArray[np.float32],
        files: Sequence[str] | None,
    ) -> None:
        predictions, confidences = probabilities.argmax(1), probabilities.max(1)
        found = np.flatnonzero(prepared.treatments != WITHOUT_DIGIT)

        def example(position: int) -> Example:
            image, treatment = prepared.images[position], int(prepared.treatments[position])
            return Example(
                index=int(indices[position]),
                file=None if files is None else files[position],
                label=int(labels[position]) if labels[position] >= 0 else None,
                prediction=int(predictions[position]) if treatment != WITHOUT_DIGIT else None,
                confidence=float(confidences[position]) if treatment != WITHOUT_DIGIT else None,
                treatment=treatment,
                source=prepared.sources.get(position),
                image=image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8),
            )

        chosen = candidates(labels[found], predictions[found], confidences[found])
        mistakes, least = (map(example, found[part].tolist()) for part in chosen)
        self.examples.add(mistakes, least, map(example, prepared.sources))

    def together(self) -> Scores:
        """The sums over all ranks, on every rank."""
        sums = torch.from_numpy(self.tally.sums)
        if self.world.size > 1:
            reduced = sums.to(self.world.device, widest_float(self.world.device))
            self.world.all_reduce(reduced)
            sums.copy_(reduced)
        examples, suspicions = Examples(), Suspicions()
        for found, suspected in self.world.from_all(lambda: (self.examples, self.suspicions)):
            examples.add(found.mistakes, found.least_confident, found.prepared)
            suspicions.counts += suspected.counts
            suspicions.first_dark = min(suspicions.first_dark, suspected.first_dark)
        warnings = []
        if self.inputs.mode == "as-is":
            warnings = suspicion_warnings(suspicions.counts, suspicions.first_dark, self.inputs)
        if without := int(self.tally.treatments[WITHOUT_DIGIT]):
            warnings.append(
                f"no digit was found in {without} of {len(self.inputs)} images: their predictions "
                "are empty"
            )
        return Scores(
            tally=self.tally,
            examples=examples,
            warnings=[*self.inputs.warnings, *warnings],
            seconds=time.perf_counter() - self._started,
        )


def _noise(count: int) -> NDArray[np.uint8]:
    """So many images of random pixels."""
    shape = (count, *IMAGE_SHAPE)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@torch.inference_mode()
def predict(model: MLP, images: NDArray[Any], world: World) -> NDArray[Any]:
    """Logarithms of the ten probabilities, n×10 float32.

    Args:
        model: on the world's device, in its precision; if it has a temperature, it is applied.
        images: n×28×28, uint8 of 0 to 255 or float32 of 0 to 1.
        world: says device and precision.
    """
    pixels = torch.from_numpy(images).to(world.device)
    logits = model(normalise(pixels, world.precision)).float()
    if model.doubt is not None:
        logits /= model.doubt.temperature
    log_probabilities: NDArray[np.float32] = logits.log_softmax(1).cpu().numpy()
    return log_probabilities


@contextmanager
def progress(
    total: int, noun: str, verb: str, *, begun: int = 0, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows how much is done: a bar on a terminal, elsewhere a line now and then.

    Args:
        total: how many there are.
        noun: what they are, in the plural.
        verb: what is done to them, in the past.
        begun: how many were done before.
        shown: whether at all.
    """
    started = said = time.perf_counter()
    bars = shows_bars()
    disabled = not (shown and bars)
    with tqdm(
        total=total,
        initial=begun,
        unit=f" {noun}",
        unit_scale=True,
        disable=disabled,
        leave=False,
        dynamic_ncols=True,
    ) as bar:

        def show(done: int) -> None:
            nonlocal said
            bar.update(done - bar.n)
            now = time.perf_counter()
            if shown and not bars and now - said > _SECONDS_BETWEEN_LINES and done > begun:
                said, speed = now, (done - begun) / (now - started)
                print(
                    f"{verb} {done:,} of {total:,} {noun}, {speed:,.{0 if speed > 20 else 1}f} "
                    f"{noun}/s, {(total - done) / speed:,.0f} s left",
                    flush=True,
                )

        yield show
