"""The batch evaluator: every image scored exactly once, by any number of processes.

Streams images through the model. What is made of the results is in report.py.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mnist.checkpoint import enclosing_checkpoint, newest_checkpoint, step_of
from mnist.config import EvaluateConfig, InputError, parse_train_config
from mnist.data import fetch_mnist, normalise, rank_slice
from mnist.distributed import World, connect, environment, widest_float
from mnist.inputs import Inputs, Suspicions, open_images, open_mnist, suspicion_warnings
from mnist.metrics import read_metrics
from mnist.model import MLP, load_model
from mnist.page import render_page
from mnist.report import (
    DISPUTED_TEST_LABELS,
    Example,
    Examples,
    Tally,
    candidates,
    changes,
    csv_header,
    csv_rows,
    figures,
    find_place,
    publish,
    read_report,
    sha256,
    staging,
)
from mnist.tracking import open_mirror, wandb_settings

# Processes exchange how far they are after so many batches: often enough for a progress display,
# and so that none waits for another longer than a collective may take.
_ROUND_BATCHES = 8
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The model file to score, and where it comes from."""

    path: Path
    run: Path | None = None  # the run's folder
    step: int | None = None  # of a run that is not finished: its checkpoint's


@dataclass(kw_only=True)
class Scores:
    """What all processes together found."""

    tally: Tally
    examples: Examples
    warnings: list[str]
    seconds: float


def evaluate(config: EvaluateConfig) -> None:
    """Do the whole job: score the images, write the three files, print the summary.

    Raises:
        InputError: the model, the images or the folders do not allow it; nothing is changed.
    """
    refuse_missing(config)
    settings = wandb_settings(config)  # may refuse WANDB_MODE
    if config.images is None:
        fetch_mnist(config.data_dir)  # before processes wait for each other
    world = connect(config)
    weights = world.from_main(lambda: find_weights(config), prepares=True)
    opened: list[tuple[MLP, Inputs]] = []

    def load() -> int:
        opened.append((load_model(weights.path), open_inputs(config, weights)))
        return len(opened[0][1])

    sizes = world.from_all(load, prepares=True)
    model, inputs = opened[0]
    if len(set(sizes)) > 1:
        raise InputError(f"{inputs.images_path}: its {sizes} images differ between processes")
    if world.is_main and weights.run is not None and weights.step is not None:
        print(f"{weights.run} is not finished: its checkpoint of step {weights.step:,} is scored")
    named = config.output_dir is not None
    wanted = config.output_dir or _place_by_name(config, weights)
    place = partial(find_place, wanted, inputs.images_path, inputs.split, named=named)
    output = world.from_main(place, prepares=True)
    write_evaluation(model, weights, inputs, output, world, config.batch_size)
    if world.is_main:
        report = json.loads((output / "report.json").read_text())
        print_summary(report, output)
        if weights.run is not None and weights.step is None:
            mirror = open_mirror(settings)
            mirror.begin(weights.run)
            mirror.evaluated(evaluation_name(config) if named else output.name, output)
            mirror.close()


def print_summary(report: dict[str, Any], output: Path) -> None:
    """The end of an evaluation in a few lines."""
    speed = report["throughput"]
    print(
        f"scored      {report['scored']:,} of {report['expected']:,}: {report['title']}, "
        f"{speed['seconds']:.1f} s, {speed['images_per_second']:,.0f} images/s",
        *summary(report, "result"),
        f"report      {output / 'report.html'}",
        sep="\n",
        flush=True,
    )


def refuse_missing(config: EvaluateConfig) -> None:
    """Before anything is fetched.

    Raises:
        InputError: no such run, or no such file.
    """
    if config.run is not None and not config.run.is_dir():
        raise InputError(f"--run {config.run}: no such run folder")
    if config.model is not None and not config.model.exists():
        raise InputError(f"--model {config.model}: no such file")


def find_weights(config: EvaluateConfig) -> Weights:
    """The model file that the options mean.

    Raises:
        InputError: the run has no weights.
    """
    if config.run is None:
        assert config.model is not None
        inside = enclosing_checkpoint(config.model)
        return Weights(path=config.model, step=None if inside is None else step_of(inside))
    final = config.run / "model.safetensors"
    inside = enclosing_checkpoint(config.run)
    if inside is not None:
        raise InputError(
            f"--run {config.run} is in a checkpoint; score it by --model {inside / final.name}, or "
            f"its run by --run {inside.parents[1]}"
        )
    if final.exists():
        return Weights(path=final, run=config.run)
    checkpoint = newest_checkpoint(config.run / "checkpoints")
    if checkpoint is None:
        raise InputError(
            f"--run {config.run}: has no weights: neither model.safetensors nor checkpoints"
        )
    return Weights(path=checkpoint / final.name, run=config.run, step=step_of(checkpoint))


def open_inputs(config: EvaluateConfig, weights: Weights) -> Inputs:
    """The images that the options mean; see ``mnist.inputs`` for the errors."""
    if config.images is not None:
        return open_images(config.images, config.labels)
    if config.split in (None, "test"):
        return open_mnist(config.data_dir, "test", validation_size=0, seed=0)
    assert weights.run is not None and config.split is not None
    run = parse_train_config(["--config", str(weights.run / "config.yaml")])
    if config.split == "validation" and not run.validation_size:
        raise InputError(f"--split validation: {weights.run} held no images out for validation")
    return open_mnist(config.data_dir, config.split, run.validation_size, run.seed)


def evaluation_name(config: EvaluateConfig) -> str:
    """The split, or the name of the user's images: of the folder, and in W&B."""
    if config.images is None:
        return config.split or "test"
    return f"images-{config.images.resolve().name.split('.')[0]}"


def _place_by_name(config: EvaluateConfig, weights: Weights) -> Path:
    """The folder of the report in ``evaluation/`` of the run, or else beside the model."""
    checkpoint = enclosing_checkpoint(weights.path) if weights.run is None else None
    if checkpoint is not None:  # into which nothing is written
        name = f"{checkpoint.name}-{evaluation_name(config)}"
        return checkpoint.parents[1] / "evaluation" / name
    return (weights.run or weights.path.parent) / "evaluation" / evaluation_name(config)


def write_evaluation(
    model: MLP, weights: Weights, inputs: Inputs, output: Path, world: World, batch_size: int
) -> Scores:
    """Score ``inputs`` and put ``predictions.csv``, ``report.json`` and ``report.html`` into
    ``output``, whole or not at all.

    Raises:
        InputError: the images are damaged, the disk is full, …; earlier files are as they were.
    """
    with ExitStack() as stack:
        aside = world.from_main(lambda: stack.enter_context(staging(output)), prepares=True)
        part = aside / ("predictions.csv" if world.is_main else f"part-{world.rank:05d}")
        scores = score(model, inputs, world, batch_size, part)
        if not world.is_main:
            return scores
        with part.open("ab") as whole:
            for rank in range(1, world.size):
                with (aside / f"part-{rank:05d}").open("rb") as other:
                    shutil.copyfileobj(other, whole, 1 << 20)
        report = _report(scores, model, weights, inputs, world, batch_size)
        report["predictions_sha256"] = sha256(part)
        pictures = {
            example.index: example.image
            for example in scores.examples.mistakes + scores.examples.least_confident
        }
        metrics = weights.run / "metrics.jsonl" if weights.run else None
        rows = read_metrics(metrics) if metrics and metrics.exists() else []
        page = render_page(report, pictures, rows)
        _check_still_right(weights, inputs, output)
        earlier = read_report(output)
        publish(aside, output, report, page)
    if earlier is not None and (different := changes(earlier, report)):
        print(f"{output}: replaced the report of {earlier['time']}, by {', '.join(different)}")
    return scores


def _check_still_right(weights: Weights, inputs: Inputs, output: Path) -> None:
    """What was found at the start may have changed while the images were scored.

    Raises:
        InputError: the run has its final model by now, or the folder the report on other images.
    """
    if weights.run is not None and weights.step is not None:
        final = weights.run / "model.safetensors"
        if final.exists():
            raise InputError(f"{weights.run} is finished by now; the same again scores {final}")
    find_place(output, inputs.images_path, inputs.split, named=True)


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
    batches = math.ceil(len(inputs) / batch_size)
    share = range(batches)[rank_slice(batches, world.rank, world.size)]
    rounds = math.ceil(math.ceil(batches / world.size) / _ROUND_BATCHES)  # of the largest share
    scorer = _Scorer(model.to(world.device, world.precision), inputs, world, part)
    with scorer, _progress(len(inputs), world.is_main) as show:
        world.from_all(scorer.open, prepares=True)
        for turn in range(rounds):

            def work(numbers: range = share[turn * _ROUND_BATCHES :][:_ROUND_BATCHES]) -> int:
                for number in numbers:
                    start = number * batch_size
                    scorer.score(start, min(start + batch_size, len(inputs)))
                return scorer.images

            show(sum(world.from_all(work, prepares=turn == 0)))
        world.from_all(scorer.close)
    scores = scorer.together()
    scored = int(scores.tally.predicted.sum())
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
                    self._file.write(csv_header(self.inputs.files is not None).encode())

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
        images, labels = self.inputs.images(start, stop), self.inputs.labels(start, stop)
        indices = self.inputs.indices(start, stop)
        self.suspicions.look(images, start)
        log_probabilities = predict(self.model, images, self.world)
        if not np.isfinite(log_probabilities).all():
            raise InputError(f"the model's output for images {start} to {stop - 1} is not finite")
        disputed = np.zeros(len(indices), bool)
        if self.inputs.is_mnist_test:
            disputed = np.isin(indices, DISPUTED_TEST_LABELS)
        self.tally.add(labels, log_probabilities, disputed)
        probabilities = np.exp(log_probabilities)
        files = None if self.inputs.files is None else self.inputs.files[start:stop]
        if self._file is not None:
            rows = csv_rows(indices, labels, probabilities, files)
            with self._writing():
                self._file.write(rows)
        self._keep_examples(images, labels, indices, probabilities, files)
        self.images += stop - start

    def _keep_examples(
        self,
        images: NDArray[Any],
        labels: NDArray[np.int64],
        indices: NDArray[np.int64],
        probabilities: NDArray[np.float32],
        files: Sequence[str] | None,
    ) -> None:
        predictions, confidences = probabilities.argmax(1), probabilities.max(1)

        def example(position: int) -> Example:
            image = images[position]
            return Example(
                index=int(indices[position]),
                file=None if files is None else files[position],
                label=int(labels[position]) if labels[position] >= 0 else None,
                prediction=int(predictions[position]),
                confidence=float(confidences[position]),
                image=image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8),
            )

        mistakes, least = candidates(labels, predictions, confidences)
        self.examples.add(map(example, mistakes), map(example, least))

    def together(self) -> Scores:
        """The sums over all ranks, on every rank."""
        sums = torch.from_numpy(self.tally.sums)
        if self.world.size > 1:
            reduced = sums.to(self.world.device, widest_float(self.world.device))
            self.world.all_reduce(reduced)
            sums.copy_(reduced)
        examples, suspicions = Examples(), Suspicions()
        for found, suspected in self.world.from_all(lambda: (self.examples, self.suspicions)):
            examples.add(found.mistakes, found.least_confident)
            suspicions.counts += suspected.counts
            suspicions.first_dark = min(suspicions.first_dark, suspected.first_dark)
        warnings = suspicion_warnings(suspicions.counts, suspicions.first_dark, self.inputs)
        return Scores(
            tally=self.tally,
            examples=examples,
            warnings=[*self.inputs.warnings, *warnings],
            seconds=time.perf_counter() - self._started,
        )


@torch.inference_mode()
def predict(model: Callable[[Tensor], Tensor], images: NDArray[Any], world: World) -> NDArray[Any]:
    """Logarithms of the ten probabilities, n×10 float32.

    Args:
        model: on the world's device, in its precision.
        images: n×28×28, uint8 of 0 to 255 or float32 of 0 to 1.
        world: says device and precision.
    """
    pixels = torch.from_numpy(images).to(world.device)
    logits = model(normalise(pixels, world.precision)).float()
    return logits.log_softmax(1).cpu().numpy()


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows how many images are scored: a bar on a terminal, elsewhere a line now and then."""
    started = said = time.perf_counter()
    terminal = sys.stderr.isatty()
    disabled = not (shown and terminal)
    with tqdm(total=total, unit=" images", unit_scale=True, disable=disabled, leave=False) as bar:

        def show(scored: int) -> None:
            nonlocal said
            bar.update(scored - bar.n)
            now = time.perf_counter()
            if shown and not terminal and now - said > _SECONDS_BETWEEN_LINES:
                said, speed = now, scored / (now - started)
                print(
                    f"scored {scored:,} of {total:,} images, {speed:,.0f} images/s, "
                    f"{(total - scored) / speed:,.0f} s left",
                    flush=True,
                )

        yield show


def _report(
    scores: Scores,
    model: MLP,
    weights: Weights,
    inputs: Inputs,
    world: World,
    batch_size: int,
) -> dict[str, Any]:
    """The content of ``report.json``; the README lists its fields."""
    name = weights.run.resolve().name if weights.run else weights.path
    return {
        "title": f"{name} on {inputs.description}",
        "model": {
            "path": str(weights.path),
            "sha256": sha256(weights.path),
            "hidden_sizes": list(model.hidden_sizes),
            "step": weights.step,
        },
        "data": {
            "description": inputs.description,
            "images": str(inputs.images_path.resolve()),
            "labels": None if inputs.labels_path is None else str(inputs.labels_path),
            **inputs.hashes(),
        },
        "expected": len(inputs),
        **figures(scores.tally),
        "mistakes": [e.row() for e in scores.examples.mistakes] if inputs.labelled else None,
        "least_confident": [e.row() for e in scores.examples.least_confident],
        "warnings": scores.warnings,
        "throughput": {
            "images_per_second": len(inputs) / scores.seconds,
            "seconds": scores.seconds,
        },
        **environment(world),
        "batch_size": batch_size,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def summary(report: dict[str, Any], name: str) -> list[str]:
    """What a person reads of a report, line by line."""
    lines = [f"warning     {warning}" for warning in report["warnings"]]
    if not report["labelled"]:
        return [*lines, f"{name:11} {report['scored']:,} predictions; accuracy needs labels"]
    low, high = report["accuracy_interval_95"]
    lines.append(
        f"{name:11} accuracy {report['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}), "
        f"loss {report['cross_entropy']:.4f}, "
        f"{report['correct']:,} of {report['labelled']:,} right"
    )
    if undisputed := report["without_disputed_labels"]:
        count = len(undisputed["disputed_labels"])
        lines.append(f"{'':11} {undisputed['accuracy']:.2%} without the {count} disputed labels")
    return lines
