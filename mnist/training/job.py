"""The training job: data, training, final model, evaluation, figures, summary."""

import dataclasses
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.data import denormalise, derived_seed, load_mnist, normalise
from mnist.distributed import World, connect
from mnist.evaluation.config import EvaluateConfig
from mnist.evaluation.inputs import Inputs, open_mnist
from mnist.evaluation.job import Weights, summary, write_evaluation
from mnist.evaluation.report import Example
from mnist.evaluation.scoring import Scores, predict, score
from mnist.fetch import fetch_mnist
from mnist.figures import (
    Painter,
    draw_curves,
    draw_distortions,
    draw_predictions,
    model_of_figure,
)
from mnist.model import MLP, Doubt, load_model, save_model
from mnist.runs.folder import RunSettings, Start, open_run_folder, refuse_other_run
from mnist.runs.metrics import read_metrics
from mnist.runs.mirror import NoMirror, send_missing
from mnist.runs.reports import SPLITS, make_room, report_of_run
from mnist.system import StopRequest, die_with_launcher, sha256, warn
from mnist.training.config import RETIRED, TrainConfig, numeric_settings, to_yaml
from mnist.training.distortion import Distortion
from mnist.training.doubt import find_doubt
from mnist.training.loop import Sample, fit
from mnist.training.trial import faster_products

_FEW_IMAGES = (
    64  # of a process in a step: below, what it sends and waits for costs more than it saves
)


def train(config: TrainConfig, painter: Painter | None, mirror: NoMirror) -> None:
    """Do the whole job: data, training, files, evaluation, summary.

    A run that was interrupted goes on; one that is complete is summarised and left as it is.

    Args:
        config: the settings.
        painter: where figures are drawn; needed on rank 0 alone.
        mirror: where W&B gets its copy from; on rank 0 alone.

    Raises:
        InputError: the settings or the folders do not allow it.
        SystemExit: interrupted; with 75 if that is saved, else with 1.
    """
    folder = config.run_folder
    if not config.fresh:
        refuse_other_run(folder, run_settings(config))
    fetch_mnist(config.data_dir)  # before processes wait for each other
    stop = StopRequest()
    world = connect(config, stop, config.threads_in_file)
    with stop, ExitStack() as stack:
        die_with_launcher(by=signal.SIGTERM)  # from now on there may be work to save
        start = world.from_main(lambda: open_run(config, world, stack), prepares=True)
        if start.complete:
            if world.is_main:
                print(f"{folder} is complete")
        else:
            config = dataclasses.replace(config, products=start.products or "auto")
            hint_at_few_images(config, world)
            mirror.begin(folder)
            model = fit(config, world, start, stop, mirror)
            if world.is_main:
                model.doubt = doubt_of(model, config)
                save_final(model, folder / "model.safetensors")
                # Also those that no checkpoint covers, as where none could be written.
                mirror.rows((folder / "metrics.jsonl").stat().st_size)
            mirror.trained()
        if world.is_main:
            assert painter is not None
            finish(config, world, painter, NoMirror() if start.complete else mirror)
            if start.complete:
                send_missing(mirror, folder)
            mirror.close()


def hint_at_few_images(config: TrainConfig, world: World) -> None:
    """Say it where more processes make a run slower."""
    each = -(-config.batch_size // world.size)
    if world.is_main and world.size > 1 and each < _FEW_IMAGES:
        warn(
            f"--batch-size {config.batch_size} leaves each of {world.size} processes {each} images "
            "a step: fewer processes or a larger --batch-size would be faster"
        )


def run_settings(config: TrainConfig) -> RunSettings:
    """What decides which run these settings are of."""
    return RunSettings(
        all=to_yaml(config),
        numeric=numeric_settings(config) | RETIRED,
        usual=numeric_settings(TrainConfig()) | RETIRED,
    )


def open_run(config: TrainConfig, world: World, stack: ExitStack) -> Start:
    """Where the run of these settings begins or goes on; see ``open_run_folder``."""
    return open_run_folder(
        config.run_folder,
        run_settings(config),
        world,
        stack,
        fresh=config.fresh,
        faster_products=partial(faster_products, config),
    )


def doubt_of(model: MLP, config: TrainConfig) -> Doubt | None:
    """How doubtful to be of a model that was taught what is no digit; None of others, and without
    validation images."""
    if not (config.non_digits and config.validation_size):
        return None
    inputs = open_mnist(config.data_dir, "validation", config.validation_size, config.seed)
    logits = predict(model.cpu(), inputs.images(0, len(inputs)), World())
    return find_doubt(logits, inputs.labels(0, len(inputs)))


def save_final(model: MLP, path: Path) -> None:
    """Write the final weights, by which the run is complete.

    Raises:
        InputError: the disk is full.
    """
    try:
        save_model(model, path)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; with that solved, the same command goes on from the newest "
            "checkpoint"
        ) from None


def finish(config: TrainConfig, world: World, painter: Painter, mirror: NoMirror) -> None:
    """Evaluate the final model and draw, as far as that is not done already; print the summary.

    Reports on MNIST's splits and figures belong to the run: those of another model, as a look at a
    checkpoint leaves them, are made anew.
    """
    folder = config.run_folder
    rows = read_metrics(folder / "metrics.jsonl")
    weights = Weights(path=folder / "model.safetensors", run=folder)
    model_sha256 = sha256(weights.path)
    curves = folder / "figures/loss_curves.png"
    if rows and model_of_figure(curves) != model_sha256:  # drawn while the test images are scored
        painter.draw(draw_curves, rows, folder.name, curves, model=model_sha256)
    # Threads would wait for one whose core draws, or W&B's process has.
    threads = max(1, world.threads - 1)
    torch.set_num_threads(threads)
    scores = _evaluate_final(config, weights, World(threads=threads))
    _draw_samples(config, weights, painter, model_sha256, scores)
    report = report_of_run(folder, "test")
    if report:
        mirror.evaluated("test", folder / "evaluation/test")
    mirror.finished()
    print_summary(config, rows, report)


def _evaluate_final(config: TrainConfig, weights: Weights, world: World) -> Scores | None:
    """Make the reports that are asked for or there already, and not on the final model; return the
    scores on the test images if they were made."""
    scores = None
    folder = config.run_folder / "evaluation"
    for split in SPLITS:
        wanted = config.evaluate == split or (folder / split / "report.json").exists()
        if wanted and not report_of_run(config.run_folder, split):
            inputs = open_mnist(config.data_dir, split, config.validation_size, config.seed)
            make_room(folder / split, split)
            model, batch_size = load_model(weights.path), EvaluateConfig().batch_size
            made = write_evaluation(model, weights, inputs, folder / split, world, batch_size)
            scores = made if split == "test" else scores
    return scores


def _draw_samples(
    config: TrainConfig,
    weights: Weights,
    painter: Painter,
    model_sha256: str,
    scores: Scores | None,
) -> None:
    """Draw predictions and distortions that are not there, or were drawn of another model."""
    folder, draw = config.run_folder, partial(painter.draw, model=model_sha256)
    grid = folder / "figures/sample_predictions.png"
    distorted = folder / "figures/distortions.png"
    split: Literal["test", "validation"] = "test" if config.evaluate == "test" else "validation"
    known = split == "test" or config.validation_size > 0
    if known and model_of_figure(grid) != model_sha256:
        inputs = open_mnist(config.data_dir, split, config.validation_size, config.seed)
        model = load_model(weights.path)
        if split != "test" or scores is None:
            scores = score(model, inputs, World(), EvaluateConfig().batch_size)
        sample = _sample_predictions(model, inputs, scores.examples.mistakes[:8], config.seed)
        title = f"{folder.name}: {split} images, 24 at random and the 8 most confident mistakes"
        draw(draw_predictions, *sample, title, grid)
    if config.distorts and model_of_figure(distorted) != model_sha256:
        title = "Training images, and below each what distortion makes of it"
        draw(draw_distortions, _sample_distortions(config), title, distorted)


def _sample_predictions(model: MLP, inputs: Inputs, mistakes: list[Example], seed: int) -> Sample:
    """Images, labels, predictions and confidences of 24 images at random, then of the mistakes."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "sample predictions"))
    chosen = torch.randperm(len(inputs), generator=generator)[:24].tolist()
    images = np.concatenate([inputs.images(i, i + 1) for i in chosen])
    labels = np.concatenate([inputs.labels(i, i + 1) for i in chosen])
    probabilities = np.exp(predict(model, images, World()))
    return (
        np.concatenate([images, *(e.image[None] for e in mistakes)]),
        np.concatenate([labels, [e.label for e in mistakes]]).astype(int),
        np.concatenate([probabilities.argmax(1), [e.prediction for e in mistakes]]).astype(int),
        np.concatenate([probabilities.max(1), [e.confidence for e in mistakes]]),
    )


def _sample_distortions(config: TrainConfig) -> NDArray[np.uint8]:
    """The first 16 training images, and six times what distortion makes of them: 7×16×28×28."""
    images = load_mnist(config.data_dir, "train").images[:16]
    distort = Distortion(config, torch.device("cpu"))
    inputs = normalise(images, torch.float32)
    made = [distort(inputs, step, len(images), slice(0, len(images))) for step in range(1, 7)]
    return torch.stack([images, *map(denormalise, made)]).numpy()


def print_summary(
    config: TrainConfig, rows: list[dict[str, Any]], report: dict[str, Any] | None
) -> None:
    """The end of a run in a few lines: accuracy, loss, time, speed, files."""
    folder, lines = config.run_folder, [""]
    if report:
        lines += summary(report, "test")
    last = rows[-1] if rows else {}
    if last.get("epoch") != config.epochs or not last.get("seconds"):
        warn(f"{folder / 'metrics.jsonl'} has lost its last row")
    else:
        if "validation/loss" in last:
            accuracy, loss = last["validation/accuracy"], last["validation/loss"]
            lines.append(f"validation  accuracy {accuracy:.2%}, loss {loss:.4f}")
        speed = last["images"] / last["seconds"]
        lines.append(
            f"training    {last['epoch']:.0f} epochs, {last['step']:,} steps in "
            f"{last['seconds']:.1f} s, {speed:,.0f} images/s"
        )
    lines.append(f"files       {folder}")
    print("\n".join(lines), flush=True)
