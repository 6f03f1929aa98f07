"""The evaluation job: which model on which images, where the report goes, and the summary."""

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mnist.cli import InputError
from mnist.distributed import World, connect
from mnist.evaluation.config import EvaluateConfig
from mnist.evaluation.inputs import Inputs, open_images, open_mnist
from mnist.evaluation.page import render_page
from mnist.evaluation.report import acceptance, figures, publish, staging
from mnist.evaluation.scoring import Scores, most_at_once, score
from mnist.fetch import fetch_mnist
from mnist.model import MLP, load_model
from mnist.runs.checkpoint import enclosing_checkpoint, newest_checkpoint, step_of
from mnist.runs.environment import environment
from mnist.runs.folder import recorded_settings
from mnist.runs.metrics import read_metrics
from mnist.runs.mirror import WandbSettings, open_mirror
from mnist.runs.reports import changes, find_place, read_report
from mnist.system import sha256


class ModelChoice(Protocol):
    """The settings by which a model is named."""

    @property
    def run(self) -> Path | None: ...
    @property
    def model(self) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The model file to score, and where it comes from."""

    path: Path
    run: Path | None = None  # the run's folder
    step: int | None = None  # of a run that is not finished: its checkpoint's

    @property
    def home(self) -> Path:
        """The folder in which what this model makes has its place: of the run, or else of the file;
        nothing is written into a checkpoint."""
        inside = enclosing_checkpoint(self.path) if self.run is None else None
        return inside.parents[1] if inside else self.run or self.path.parent

    def say_unfinished(self, does: str) -> None:
        """Print which checkpoint of an unfinished run it is, and what it does here."""
        if self.run is not None and self.step is not None:
            print(f"{self.run} is not finished: its checkpoint of step {self.step:,} {does}")


def evaluate(config: EvaluateConfig) -> None:
    """Do the whole job: score the images, write the three files, print the summary.

    Raises:
        InputError: the model, the images or the folders do not allow it; nothing is changed.
    """
    refuse_missing(config)
    settings = WandbSettings.of(config)  # may refuse WANDB_MODE
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
    if world.is_main:
        weights.say_unfinished("is scored")
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
        *_prepared(report),
        *summary(report, "result"),
        f"report      {output / 'report.html'}",
        sep="\n",
        flush=True,
    )


def _prepared(report: dict[str, Any]) -> list[str]:
    """What was done to the user's images, unless that is nothing."""
    counts = report["prepared"]
    if report["prepare"] == "as-is" or counts["as_they_are"] == report["scored"]:
        return []
    said = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items())
    return [f"prepared    {said}"]


def refuse_missing(config: ModelChoice) -> None:
    """Before anything is fetched.

    Raises:
        InputError: no such run, or no such file.
    """
    if config.run is not None and not config.run.is_dir():
        raise InputError(f"--run {config.run}: no such run folder")
    if config.model is not None and not config.model.exists():
        raise InputError(f"--model {config.model}: no such file")


def find_weights(config: ModelChoice) -> Weights:
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
            f"{config.run} is in a checkpoint; name its model, {inside / final.name}, or its run, "
            f"{inside.parents[1]}"
        )
    if final.exists():
        return Weights(path=final, run=config.run)
    checkpoint = newest_checkpoint(config.run / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{config.run}: has no weights: neither model.safetensors nor checkpoints")
    return Weights(path=checkpoint / final.name, run=config.run, step=step_of(checkpoint))


def open_inputs(config: EvaluateConfig, weights: Weights) -> Inputs:
    """The images that the options mean; see ``inputs.py`` for the errors."""
    if config.images is not None:
        return open_images(config.images, config.labels, config.prepare)
    if config.split in (None, "test"):
        return open_mnist(config.data_dir, "test", validation_size=0, seed=0)
    assert weights.run is not None and config.split is not None
    size, seed = held_out(weights.run)
    if config.split == "validation" and not size:
        raise InputError(f"--split validation: {weights.run} held no images out for validation")
    return open_mnist(config.data_dir, config.split, size, seed)


def held_out(run: Path) -> tuple[int, int]:
    """How many training images a run held out for validation, and the seed that chose them.

    Raises:
        InputError: its config.yaml does not say.
    """
    path = run / "config.yaml"
    try:
        settings = recorded_settings(run)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    found: list[int] = []
    for name, most in (("validation_size", 59_000), ("seed", math.inf)):
        value = settings.get(name)
        if type(value) is not int or not 0 <= value <= most:
            raise InputError(f"{path} is damaged: {name} is {value}")
        found.append(value)
    return found[0], found[1]


def evaluation_name(config: EvaluateConfig) -> str:
    """The split, or the name of the user's images: of the folder, and in W&B."""
    if config.images is None:
        return config.split or "test"
    return f"images-{config.images.resolve().name.split('.')[0]}"


def _place_by_name(config: EvaluateConfig, weights: Weights) -> Path:
    """The folder of the report in ``evaluation/`` of the run, or else beside the model."""
    name = evaluation_name(config)
    checkpoint = enclosing_checkpoint(weights.path) if weights.run is None else None
    if checkpoint is not None:
        name = f"{checkpoint.name}-{name}"
    return weights.home / "evaluation" / name


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
        pictures = {example.index: example.image for example in scores.examples.all()}
        sources = {e.index: e.source for e in scores.examples.prepared if e.source is not None}
        metrics = weights.run / "metrics.jsonl" if weights.run else None
        rows = read_metrics(metrics) if metrics and metrics.exists() else []
        page = render_page(report, pictures, rows, sources)
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


def _report(
    scores: Scores,
    model: MLP,
    weights: Weights,
    inputs: Inputs,
    world: World,
    batch_size: int,
) -> dict[str, Any]:
    """The content of ``report.json``; docs/evaluate.md lists its fields."""
    name = weights.run.resolve().name if weights.run else weights.path
    return {
        "title": f"{name} on {inputs.description}",
        "model": {
            "path": str(weights.path),
            "sha256": sha256(weights.path),
            "hidden_sizes": list(model.hidden_sizes),
            "step": weights.step,
            "temperature": model.doubt.temperature if model.doubt else None,
        },
        "data": {
            "description": inputs.description,
            "images": str(inputs.images_path.resolve()),
            "labels": None if inputs.labels_path is None else str(inputs.labels_path),
            **inputs.hashes(),
        },
        "expected": len(inputs),
        "prepare": inputs.mode,
        **figures(scores.tally),
        "acceptance": acceptance(scores.tally, model.doubt.threshold) if model.doubt else None,
        "mistakes": [e.row() for e in scores.examples.mistakes] if inputs.labelled else None,
        "least_confident": [e.row() for e in scores.examples.least_confident],
        "prepared_examples": [e.row() for e in scores.examples.prepared],
        "warnings": scores.warnings,
        "throughput": {
            "images_per_second": len(inputs) / scores.seconds,
            "seconds": scores.seconds,
        },
        **environment(world),
        "batch_size": min(batch_size, most_at_once(inputs)),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def summary(report: dict[str, Any], name: str) -> list[str]:
    """What a person reads of a report, line by line."""
    lines = [f"warning     {warning}" for warning in report["warnings"]]
    accepted = []
    if found := report.get("acceptance"):  # reports of earlier versions lack it
        of_these = f", of these {found['accuracy']:.2%} right" if found["labelled"] else ""
        accepted = [f"accepted    {found['share']:.2%} of the predictions{of_these}"]
    if not report["labelled"]:
        said = f"{name:11} {report['scored']:,} predictions; accuracy needs labels"
        return [*lines, said, *accepted]
    low, high = report["accuracy_interval_95"]
    lines.append(
        f"{name:11} accuracy {report['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}), "
        f"loss {report['cross_entropy']:.4f}, "
        f"{report['correct']:,} of {report['labelled']:,} right"
    )
    if undisputed := report["without_disputed_labels"]:
        count = len(undisputed["disputed_labels"])
        lines.append(f"{'':11} {undisputed['accuracy']:.2%} without the {count} disputed labels")
    return lines + accepted
