"""The training loop: which images each step takes, the step, and what is logged and saved of it."""

import dataclasses
import json
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from mnist.cli import InputError
from mnist.data import (
    BatchedDigits,
    GlobalBatches,
    load_batches,
    load_mnist,
    rank_slice,
    split_validation,
)
from mnist.distributed import PRECISIONS, World, widest_float
from mnist.model import MLP, model_bytes
from mnist.pace import Pace, SpeedWatch
from mnist.runs.checkpoint import Contents, Saver
from mnist.runs.folder import Start
from mnist.runs.metrics import NoTracker, Tracker
from mnist.runs.mirror import NoMirror
from mnist.system import StopRequest, flush_to_disk
from mnist.training.allreduce import open_reducer
from mnist.training.config import TrainConfig, to_yaml
from mnist.training.convolution import Kernels
from mnist.training.distortion import Distortion
from mnist.training.step import Learner
from mnist.training.synthesis import synthesise

_VALIDATION_BATCH = 1024  # large enough for full speed; the activations stay in megabytes
_FREE_RATE = 0.02  # of the learning rate, once layers that were tied are set free: docs/record.md
_GPU_STEPS_BETWEEN_LOOKS = 16  # at whether to stop: each waits for the GPU


Sample = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[Any]]
"""n images, 28×28, their labels, predictions, and the confidences of these."""


@dataclass(frozen=True)
class Plan:
    """Which images and which learning rate belong to each step, counted from 1."""

    size: int  # training images
    config: TrainConfig

    @cached_property
    def steps_per_epoch(self) -> int:
        """Of which the last may have fewer images than the others."""
        return math.ceil(self.size / self.config.batch_size)

    @cached_property
    def steps(self) -> int:
        """In all epochs."""
        return self.config.epochs * self.steps_per_epoch

    def images_until(self, step: int) -> int:
        """Images seen by the end of a step, over all processes."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.size + min(rest * self.config.batch_size, self.size)

    def batch_size(self, step: int) -> int:
        """Images of a step, over all processes."""
        return self.images_until(step) - self.images_until(step - 1)

    def learning_rate(self, step: int) -> float:
        """Of a step, by the schedule at its middle, which layers that are set free start over."""
        rate, tied = self.config.learning_rate, self.config.tied
        progress = (step - 0.5) / self.steps
        if self.is_tied(step):
            progress /= tied
        elif tied:
            rate, progress = _FREE_RATE * rate, (progress - tied) / (1 - tied)
        return rate * schedule(progress, self.config)

    def averaging(self, step: int) -> float:
        """The weight that a step's weights have in their average.

        Early steps have more, as the average should soon forget the initial weights.
        """
        if not self.config.averaging:
            return 0.0
        return max(1 - self.config.averaging, 10 / (10 + step))

    def is_tied(self, step: int) -> bool:
        """Whether the first layers are convolutions in a step, or, for 0, before the first."""
        return self.config.tied > 0 and step <= self.config.tied * self.steps

    def sets_free(self, step: int) -> bool:
        """Whether a step is the first in which they no longer are."""
        return self.is_tied(step - 1) and not self.is_tied(step)

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is the last of its epoch."""
        return step % self.steps_per_epoch == 0


class Interval:
    """The steps since the last row of ``metrics.jsonl``, and the time they took."""

    def __init__(self, plan: Plan, start: Start) -> None:
        self._plan = plan
        self._logged_step, self._seconds = start.logged_step, start.seconds
        self._began = time.perf_counter() - start.open_seconds

    def end(self, step: int, totals: Tensor) -> dict[str, Any]:
        """The row for it, from the sums of loss and correct predictions."""
        images = self._plan.images_until(step)
        seen = images - self._plan.images_until(self._logged_step)
        number = totals[2].clamp(min=1) if len(totals) > 2 else seen  # only of digits
        loss, accuracy = (totals[:2] / number).tolist()  # waits for a GPU
        elapsed = time.perf_counter() - self._began
        self._logged_step, self._seconds = step, self._seconds + elapsed
        return {
            "step": step,
            "epoch": images / self._plan.size,
            "images": images,
            "train/loss": loss,
            "train/accuracy": accuracy,
            "learning_rate": self._plan.learning_rate(step),
            "images_per_second": seen / elapsed,
            "seconds": self._seconds,
        }

    def begin(self) -> None:
        """Let the next one begin now."""
        self._began = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of it."""
        return {
            "logged_step": self._logged_step,
            "seconds": self._seconds,
            "open_seconds": time.perf_counter() - self._began,
        }


def fit(
    config: TrainConfig,
    world: World,
    start: Start | None = None,
    stop: StopRequest | None = None,
    mirror: NoMirror | None = None,
) -> MLP:
    """Train a new model, or go on with one; every rank returns the same.

    Logs rows of: step, epoch and images (so far), train/loss and train/accuracy (means over the
    digits since the last row, each scored before its step learned from it), learning_rate,
    images_per_second, seconds (of training, so far); at the end of an epoch also validation/loss
    and validation/accuracy.

    Raises:
        InputError: training diverged, or a row cannot be written.
        SystemExit: ``stop`` was requested, on any rank; with 75 if all is saved, else with 1.
    """
    start, stop, mirror = start or Start(), stop or StopRequest(), mirror or NoMirror()
    if start.precision is not None:
        world = dataclasses.replace(world, precision=PRECISIONS[start.precision])
    look_every = 1 if world.device.type == "cpu" else _GPU_STEPS_BETWEEN_LOOKS
    interrupted = False
    model = (Kernels if config.tied else MLP)(config.hidden_sizes).initialise(config.seed)
    reducer = open_reducer(world, model)
    with ExitStack() as stack:
        with world.preparing():
            learner = Learner(model, config, world, start.products, reducer)
            training, validation = load_training_data(config, world, learner.input_dtype)
            plan = Plan(len(training), config)
            batches = GlobalBatches(
                size=len(training),
                batch_size=config.batch_size,
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
                start_step=start.step,
                stop_step=plan.steps,
            )
            distort = Distortion(config, world.device) if config.distorts else None
            tracker: Tracker = NoTracker()
            saver: Saver | None = None
            if world.is_main:
                metrics = config.run_folder / "metrics.jsonl"
                tracker = stack.enter_context(
                    Tracker(metrics, config.epochs, plan.steps, start.step, start.metrics_bytes)
                )
                saver = stack.enter_context(
                    Saver(config.run_folder / "checkpoints", config.keep_checkpoints)
                )
        if config.tied and not plan.is_tied(start.step):
            learner = set_free(learner)
        if start.checkpoint is not None:
            load_checkpoint(learner, start.checkpoint)
        interval = Interval(plan, start)

        def watched() -> tuple[Pace, SpeedWatch]:
            results = partial(results_of_steps, learner, training, validation, plan, distort)
            threads = world.threads if world.device.type == "cpu" else 1
            watch = SpeedWatch("training", world.threads, world.is_main)
            return Pace(threads, results), watch

        pace, watch = watched()
        stack.callback(lambda: pace.close())
        resumed = time.perf_counter()
        for step, (images, labels) in enumerate(load_batches(training, batches), start.step + 1):
            rate, batch_size = plan.learning_rate(step), plan.batch_size(step)
            if distort is not None:
                rows = rank_slice(batch_size, world.rank, world.size)
                images = distort(images, step, batch_size, rows)
            if plan.sets_free(step):
                pace.close()
                learner = set_free(learner)
                pace, watch = watched()
            learner.step(images, labels, batch_size, rate, plan.averaging(step), stop.requested)
            if step % look_every == 0:
                interrupted = step < plan.steps and learner.asked_to_stop()
            seconds = time.perf_counter() - resumed
            pace.count(seconds)
            watch.count(batch_size, seconds)
            if plan.ends_epoch(step) or step % config.log_every == 0:
                row = interval.end(step, learner.take_totals())
                if plan.ends_epoch(step) and config.validation_size:
                    scores, sample = validate(learner, validation, config.validation_size)
                    row |= scores
                    mirror.grid(step, *sample)
                check_finite(row, learner, training.part(slice(1)), plan)
                tracker.log(row)
                interval.begin()
            due = config.checkpoint_every is not None and step % config.checkpoint_every == 0
            saves = plan.ends_epoch(step) or due or interrupted
            if saves:
                learner.sum_up()
            if saver is not None and saves:
                state = {"step": step, "metrics_bytes": tracker.bytes} | interval.state()
                send = partial(mirror.rows, tracker.bytes)
                saver.save(step, checkpoint_files(learner, state, config), verified=send)
            if interrupted:
                break
            resumed = time.perf_counter()
    if interrupted:
        # All learn it together: a launcher ends the others as soon as one has ended.
        saved = world.from_main(lambda: saver is not None and saver.newest == step)
        if world.is_main:
            said = "saved" if saved else "NOT saved, see above"
            same = "the same command without --fresh" if config.fresh else "the same command again"
            print(
                f"interrupted at step {step:,}: {said}; {same} goes on with {config.run_folder}",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(75 if saved else 1)
    return learner.mlp()


def set_free(learner: Learner) -> Learner:
    """One whose first layers are no longer convolutions, from the average of the weights; its
    optimizer starts over. All ranks do this together."""
    learner.sum_up()
    mlp, world = learner.mlp(), learner.world
    freed = Learner(mlp, learner.config, world, learner.products, open_reducer(world, mlp))
    freed.totals.copy_(learner.totals)
    return freed


def results_of_steps(
    learner: Learner,
    training: BatchedDigits,
    validation: BatchedDigits,
    plan: Plan,
    distort: Distortion | None,
) -> list[Tensor]:
    """What steps and validation compute, in all sizes that batches have, without consequences."""
    rank, size = learner.world.rank, learner.world.size
    found: list[Tensor] = []
    for step in (1, plan.steps_per_epoch):  # of which the last may be smaller
        batch_size = plan.batch_size(step)
        rows = rank_slice(batch_size, rank, size)
        images, labels = training.part(rows), training.labels[rows]
        if distort is not None:
            images = distort(images, step, batch_size, rows)
            found.append(images)
        found.append(learner.gradient_of(images, labels))
    chunks = {len(images): images for images, _ in validation.chunks(_VALIDATION_BATCH)}
    return found + [learner.logits(images) for images in chunks.values()]


def check_finite(row: dict[str, Any], learner: Learner, images: Tensor, plan: Plan) -> None:
    """Raise an InputError if a row shows that training has diverged."""
    finite = all(map(math.isfinite, row.values()))
    if row["step"] == plan.steps:  # no later row would show what the last step did
        finite &= bool(learner.logits(images).isfinite().all())
    if not finite:
        raise InputError(
            f"training diverged: the loss is not finite by step {row['step']}; "
            f"take a --learning-rate below {plan.config.learning_rate} and another --run-name, "
            "or --fresh"
        )


def checkpoint_files(learner: Learner, state: dict[str, Any], config: TrainConfig) -> Contents:
    """A copy of what training needs to go on from here, which becomes files when it is called."""
    weights, optimizer = learner.weights(), learner.state()
    metrics = config.run_folder / "metrics.jsonl"
    state |= {"precision": learner.world.precision_name, "settings": to_yaml(config)}

    def files() -> dict[str, bytes]:
        flush_to_disk(metrics)  # whose length the state tells
        return {
            "model.safetensors": model_bytes(config.hidden_sizes, weights),
            "optimizer.safetensors": save({name: value.cpu() for name, value in optimizer.items()}),
            "state.json": json.dumps(state, indent=2).encode(),
        }

    return files


def load_checkpoint(learner: Learner, files: dict[str, bytes]) -> None:
    """Let a learner go on from a checkpoint's files."""
    learner.load(load(files["model.safetensors"]), load(files["optimizer.safetensors"]))


def load_training_data(
    config: TrainConfig, world: World, dtype: torch.dtype
) -> tuple[BatchedDigits, BatchedDigits]:
    """All training images, and this rank's share of the validation images, ready on the device."""
    digits = load_mnist(config.data_dir, "train")
    chosen, held_out = split_validation(digits.labels, config.validation_size, config.seed)
    share = held_out[rank_slice(len(held_out), world.rank, world.size)]

    def prepared(images: Tensor, labels: Tensor) -> BatchedDigits:
        return BatchedDigits(images.to(world.device), labels.to(world.device), dtype)

    training = synthesise(digits.images[chosen], digits.labels[chosen], config)
    return prepared(*training), prepared(digits.images[share], digits.labels[share])


def schedule(progress: float, config: TrainConfig) -> float:
    """The learning rate as a share of its peak, at ``progress`` 0 to 1 through the steps."""
    if config.schedule == "constant":
        return 1.0
    if progress < config.warmup:
        return progress / config.warmup
    left = (1 - progress) / (1 - config.warmup)
    return left if config.schedule == "triangular" else (1 - math.cos(math.pi * left)) / 2


def validate(learner: Learner, share: BatchedDigits, size: int) -> tuple[dict[str, float], Sample]:
    """Loss and accuracy over the ``size`` validation images, of which each rank has its share; and
    of this share, as a sample, the first 24 images and the 8 most confident mistakes."""
    device = share.images.device
    sums = torch.zeros(2, dtype=widest_float(device), device=device)
    predictions, confidences = [], []
    for images, labels in share.chunks(_VALIDATION_BATCH):
        log_probabilities = learner.logits(images).log_softmax(1)
        sums[0] += functional.nll_loss(log_probabilities, labels, reduction="sum")
        highest, prediction = log_probabilities.max(1)
        sums[1] += (prediction == labels).sum()
        predictions.append(prediction)
        confidences.append(highest.exp())
    learner.world.all_reduce(sums)
    loss, accuracy = (sums / size).tolist()
    sample = _sample_of(share, torch.cat(predictions), torch.cat(confidences))
    return {"validation/loss": loss, "validation/accuracy": accuracy}, sample


def _sample_of(share: BatchedDigits, predictions: Tensor, confidences: Tensor) -> Sample:
    wrong = (predictions != share.labels).nonzero()[:, 0]
    mistakes = wrong[confidences[wrong].argsort(descending=True)[:8]]
    first = torch.arange(len(predictions), device=predictions.device)[:24]
    chosen = torch.cat([first, mistakes])
    values = (share.labels[chosen], predictions[chosen], confidences[chosen])
    labels, digits, shares = (value.cpu().numpy() for value in values)
    return share.images[chosen].cpu().numpy(), labels, digits, shares
