"""The training loop, and the folder that a run leaves behind."""

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional

from mnist.config import (
    EvaluateConfig,
    InputError,
    TrainConfig,
    derived_seed,
    numeric_settings,
    option,
    to_yaml,
)
from mnist.data import (
    BatchedDigits,
    GlobalBatches,
    fetch_mnist,
    load_batches,
    load_mnist,
    normalise,
    rank_slice,
    split_validation,
)
from mnist.distributed import World, connect, environment, widest_float
from mnist.evaluation import Weights, predict, score, summary, write_evaluation
from mnist.figures import Painter, draw_curves, draw_predictions
from mnist.inputs import Inputs, open_mnist
from mnist.model import MLP, load_model, save_model
from mnist.report import Example
from mnist.step import Learner
from mnist.system import write_file
from mnist.tracking import NoTracker, Tracker, read_metrics

_VALIDATION_BATCH = 4096  # large enough for full speed; the activations stay in megabytes


def train(config: TrainConfig, painter: Painter | None) -> None:
    """Do the whole job: data, training, files, evaluation, summary.

    A run that is complete already is summarised and left as it is.

    Args:
        config: the settings.
        painter: where figures are drawn; needed on rank 0 alone.

    Raises:
        InputError: the settings or the folders do not allow it.
    """
    fetch_mnist(config.data_dir)  # before processes wait for each other
    world = connect(config)
    complete = world.from_main(lambda: open_run_folder(config, world))
    if complete and world.is_main:
        print(f"{config.run_folder} is complete")
    if not complete:
        model = fit(config, world)
        if world.is_main:
            save_model(model, config.run_folder / "model.safetensors")
    if world.is_main:
        assert painter is not None
        finish(config, world, painter)


def open_run_folder(config: TrainConfig, world: World) -> bool:
    """Make the run's folder, or check that it is of the same run; return whether it is complete.

    Raises:
        InputError: the folder is of other settings, is something else, or cannot be written.
    """
    folder = config.run_folder
    settings = folder / "config.yaml"
    try:
        if settings.exists():
            recorded = yaml.safe_load(settings.read_text())
            if not isinstance(recorded, dict):
                raise InputError(f"{settings} is damaged: it holds no settings")
            changed = [
                f"{option(name)} {recorded.get(name)} there, {value} here"
                for name, value in numeric_settings(config).items()
                if recorded.get(name) != value
            ]
            if changed:
                raise InputError(
                    f"{folder} is a run with other settings ({'; '.join(changed)}); "
                    "choose another --run-name"
                )
            if (folder / "model.safetensors").exists():
                return True
        elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} is not a run folder; choose another --run-name")
        folder.mkdir(parents=True, exist_ok=True)
        write_file(settings, yaml.safe_dump(to_yaml(config), sort_keys=False))
        write_file(folder / "environment.json", json.dumps(environment(world), indent=2) + "\n")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"run folder {folder}: {reason}; see --runs-dir") from None
    return False


def fit(config: TrainConfig, world: World) -> MLP:
    """Train a new model; every rank returns the same one.

    Logs rows of: step, epoch and images (so far), train/loss and train/accuracy (means over the
    images since the last row, each scored before its step learned from it), learning_rate,
    images_per_second, seconds (of training, so far); at the end of an epoch also validation/loss
    and validation/accuracy.
    """
    training, validation = load_training_data(config, world)
    steps_per_epoch = math.ceil(len(training) / config.batch_size)
    steps = config.epochs * steps_per_epoch
    batches = GlobalBatches(
        size=len(training),
        batch_size=config.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        stop_step=steps,
    )
    learner = Learner(MLP(config.hidden_sizes).initialise(config.seed), config, world)

    def images_until(step: int) -> int:
        epochs, rest = divmod(step, steps_per_epoch)
        return epochs * len(training) + min(rest * config.batch_size, len(training))

    metrics = config.run_folder / "metrics.jsonl"
    with Tracker(metrics, steps, config.epochs) if world.is_main else NoTracker() as tracker:
        logged_step, seconds, started = 0, 0.0, time.perf_counter()
        for step, (images, labels) in enumerate(load_batches(training, batches), start=1):
            batch_size = images_until(step) - images_until(step - 1)
            rate = config.learning_rate * schedule((step - 0.5) / steps, config)
            learner.step(images, labels, batch_size, rate)

            epoch_ends = step % steps_per_epoch == 0
            if not (epoch_ends or step % config.log_every == 0):
                continue
            seen = images_until(step) - images_until(logged_step)
            loss, accuracy = (learner.take_totals() / seen).tolist()
            elapsed = time.perf_counter() - started
            row: dict[str, Any] = {
                "step": step,
                "epoch": images_until(step) / len(training),
                "images": images_until(step),
                "train/loss": loss,
                "train/accuracy": accuracy,
                "learning_rate": rate,
                "images_per_second": seen / elapsed,
                "seconds": (seconds := seconds + elapsed),
            }
            if epoch_ends and config.validation_size:
                row |= validate(learner, validation, config.validation_size)
            finite = all(map(math.isfinite, row.values()))
            if step == steps:  # no later row would show what the last step did
                finite &= bool(learner.logits(training.images[:1]).isfinite().all())
            if not finite:
                raise InputError(
                    f"training diverged: the loss is not finite by step {step}; "
                    f"take a --learning-rate below {config.learning_rate}"
                )
            tracker.log(row)
            logged_step, started = step, time.perf_counter()
    return learner.model


def load_training_data(config: TrainConfig, world: World) -> tuple[BatchedDigits, BatchedDigits]:
    """All training images, and this rank's share of the validation images, ready on the device."""
    digits = load_mnist(config.data_dir, "train")
    chosen, held_out = split_validation(digits.labels, config.validation_size, config.seed)
    share = held_out[rank_slice(len(held_out), world.rank, world.size)]

    def prepared(indices: Tensor) -> BatchedDigits:
        images = normalise(digits.images[indices], world.precision)
        return BatchedDigits(images.to(world.device), digits.labels[indices].to(world.device))

    return prepared(chosen), prepared(share)


def schedule(progress: float, config: TrainConfig) -> float:
    """The learning rate as a share of its peak, at ``progress`` 0 to 1 through the steps."""
    if config.schedule == "constant":
        return 1.0
    if progress < config.warmup:
        return progress / config.warmup
    return (1 - progress) / (1 - config.warmup)


def validate(learner: Learner, share: BatchedDigits, size: int) -> dict[str, float]:
    """Loss and accuracy over the ``size`` validation images, of which each rank has its share."""
    device = share.images.device
    sums = torch.zeros(2, dtype=widest_float(device), device=device)
    for images, labels in zip(
        share.images.split(_VALIDATION_BATCH), share.labels.split(_VALIDATION_BATCH), strict=True
    ):
        logits = learner.logits(images)
        sums[0] += functional.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    learner.world.all_reduce(sums)
    loss, accuracy = (sums / size).tolist()
    return {"validation/loss": loss, "validation/accuracy": accuracy}


def finish(config: TrainConfig, world: World, painter: Painter) -> None:
    """Evaluate the final model and draw, as far as that is not done already; print the summary."""
    folder = config.run_folder
    curves, grid = folder / "figures/loss_curves.png", folder / "figures/sample_predictions.png"
    evaluation = folder / "evaluation/test"
    rows = read_metrics(folder / "metrics.jsonl")
    weights = Weights(path=folder / "model.safetensors", run=folder)
    model = load_model(weights.path)
    if not curves.exists():
        painter.draw(draw_curves, rows, folder.name, curves)
    test = config.evaluate == "test"
    unreported = test and not (evaluation / "report.json").exists()
    if (unreported or not grid.exists()) and (test or config.validation_size):
        split: Literal["test", "validation"] = "test" if test else "validation"
        inputs = open_mnist(config.data_dir, split, config.validation_size, config.seed)
        alone = World(threads=world.threads)
        batch_size = EvaluateConfig().batch_size
        if unreported:
            scores = write_evaluation(model, weights, inputs, evaluation, alone, batch_size)
        else:
            scores = score(model, inputs, alone, batch_size)
        sample = _sample_predictions(model, inputs, scores.examples.mistakes[:8], config.seed)
        title = f"{folder.name}: {split} images, 24 at random and the 8 most confident mistakes"
        painter.draw(draw_predictions, *sample, title, grid)
    print_summary(folder, rows)


def _sample_predictions(
    model: MLP, inputs: Inputs, mistakes: list[Example], seed: int
) -> tuple[np.ndarray, ...]:
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


def print_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The end of a run in a few lines: accuracy, loss, time, speed, files."""
    last = rows[-1]
    lines = [""]
    report_file = folder / "evaluation/test/report.json"
    if report_file.exists():
        try:
            lines += summary(json.loads(report_file.read_text()), "test")
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{report_file} is damaged; remove it to evaluate again") from None
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
