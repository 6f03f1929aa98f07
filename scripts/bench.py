"""Speed of training and scoring, measured side by side: everything interleaved in one run.

Absolute times wander by a factor of two on a shared machine; medians of ratios of one run do not.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from mnist.config import EvaluateConfig, TrainConfig, parse_train_config
from mnist.data import fetch_mnist
from mnist.distributed import World, connect
from mnist.evaluation import score
from mnist.inputs import open_mnist
from mnist.metrics import read_metrics
from mnist.model import MLP
from mnist.run_folder import open_run_folder
from mnist.step import Learner
from mnist.training import fit, load_training_data

JOB = Path(__file__).parents[1] / "jobs" / "train.py"


def loader_epoch(data_dir: Path) -> Callable[[], float]:
    """An epoch as it is usually written: DataLoader, torchvision's transforms, autograd, fp32."""
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    data = datasets.MNIST(str(data_dir), train=True, transform=transform)
    model = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128)),
        *(nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(data, batch_size=64, shuffle=True)

    def epoch() -> float:
        started = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - started

    return epoch


def our_training(config: TrainConfig, world: World, folder: Path) -> Callable[[], float]:
    """The real loop, as its own metrics time it: training without validation and files."""
    config = replace(config, runs_dir=folder, fresh=True)

    def seconds() -> float:
        with ExitStack() as stack:
            fit(config, world, open_run_folder(config, world, stack))
        return read_metrics(config.run_folder / "metrics.jsonl")[-1]["seconds"]

    return seconds


def bare_steps(config: TrainConfig, world: World) -> Callable[[], float]:
    """As many steps of the same model and optimizer on one fixed batch.

    With a rate of 0: learning one batch by heart ends in denormal numbers, which are slow.
    """
    training, _ = load_training_data(config, world)
    learner = Learner(MLP(config.hidden_sizes).initialise(0), config, world)
    images, labels = training[[torch.arange(config.batch_size)]][0]
    steps = -(-len(training) // config.batch_size) * config.epochs

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            learner.step(images, labels, config.batch_size, 0.0)
        return time.perf_counter() - started

    return seconds


def loader_scoring(data_dir: Path) -> Callable[[], float]:
    """Scoring the test images as it is usually written: DataLoader, torchvision's transforms."""
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    loader = DataLoader(
        datasets.MNIST(str(data_dir), train=False, transform=transform), batch_size=1000
    )
    model = MLP(TrainConfig().hidden_sizes)

    @torch.no_grad()
    def seconds() -> float:
        started, loss, correct = time.perf_counter(), 0.0, 0
        for images, labels in loader:
            logits = model(images)
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
        return time.perf_counter() - started

    return seconds


def our_scoring(data_dir: Path, world: World, part: Path | None) -> Callable[[], float]:
    """The evaluator's loop over the test images, with or without predictions.csv."""
    inputs = open_mnist(data_dir, "test", 0, 0)
    model = MLP(TrainConfig().hidden_sizes)
    return lambda: score(model, inputs, world, EvaluateConfig().batch_size, part).seconds


def bare_products(number: int) -> Callable[[], float]:
    """The matrix products alone that scoring so many images takes: the limit of the hardware."""
    size = EvaluateConfig().batch_size
    widths = (784, *TrainConfig().hidden_sizes, 10)
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(outputs, inputs) for inputs, outputs in pairs]

    def seconds() -> float:
        total = 0.0
        for start in range(0, number, size):
            rows = min(size, number - start)
            inputs = [torch.randn(rows, width) for width in widths[:-1]]
            started = time.perf_counter()
            for values, weight in zip(inputs, weights, strict=True):
                values @ weight.t()
            total += time.perf_counter() - started
        return total

    return seconds


def process(*words: str) -> Callable[[], float]:
    """A whole process, from the command to its end."""

    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        return time.perf_counter() - started

    return seconds


def main() -> None:
    """Measure in rounds, then print the table; --json FILE keeps every measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--data-dir", type=Path, default=TrainConfig().data_dir)
    parser.add_argument("--json", type=Path, help="file for all measurements, in seconds")
    options = parser.parse_args()
    data_dir = options.data_dir.resolve()
    fetch_mnist(data_dir)
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    # The whole training set, as the loader loop sees it.
    common = ["--data-dir", str(data_dir), "--validation-size", "0"]
    auto = parse_train_config([*common, "--epochs", "1"])
    fp32 = replace(auto, precision="fp32")
    plain_sums = replace(fp32, exact_sums=False)
    fast = parse_train_config(["--recipe", "fast", "--data-dir", str(data_dir)])
    world, full = connect(auto), connect(fp32)
    native = f"baseline auto ({world.precision_name})"
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    (folder / "empty.py").touch()
    fast_job = [str(JOB), "--recipe", "fast", "--data-dir", str(data_dir), "--runs-dir"]
    runs = iter(range(1000))

    def fast_process() -> float:
        return process(*launch, *fast_job, str(folder / f"runs{next(runs)}"))()

    measures = {
        "DataLoader loop, epoch": loader_epoch(data_dir),
        "baseline fp32, epoch": our_training(fp32, full, folder / "fp32"),
        "baseline fp32, bare steps": bare_steps(fp32, full),
        "baseline fp32 --no-exact-sums, epoch": our_training(plain_sums, full, folder / "plain"),
        "baseline fp32 --no-exact-sums, bare steps": bare_steps(plain_sums, full),
        f"{native}, epoch": our_training(auto, world, folder / "auto"),
        f"{native}, bare steps": bare_steps(auto, world),
        "fast, whole training": our_training(fast, world, folder / "fast"),
        "scoring, DataLoader loop": loader_scoring(data_dir),
        "scoring": our_scoring(data_dir, full, None),
        "scoring with predictions.csv": our_scoring(data_dir, full, folder / "predictions.csv"),
        "scoring, matrix products alone": bare_products(10_000),
        "empty script under accelerate launch": process(*launch, str(folder / "empty.py")),
        "fast under accelerate launch": fast_process,
    }
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(options.rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if turn:  # the first round warms up
                seconds[name].append(value)
    loop = statistics.median(seconds["DataLoader loop, epoch"])
    print(f"{world.threads} threads, {options.rounds} rounds, medians, on {os.uname().machine}\n")
    print(f"{'':45}  seconds   of the DataLoader loop's epoch")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:45}  {median:7.2f}   {median / loop:.3f}  (1/{loop / median:.1f})")

    def ratio(one: str, other: str) -> None:
        value = statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        print(f"{one} / {other}: {value:.3f}")

    print()
    for name in seconds:
        if name.endswith(", bare steps"):
            ratio(name.replace("bare steps", "epoch"), name)
    ratio("fast, whole training", "DataLoader loop, epoch")
    ratio("scoring, DataLoader loop", "scoring")
    ratio("scoring, matrix products alone", "scoring")
    ratio("fast under accelerate launch", "empty script under accelerate launch")
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=2) + "\n")
    temporary.cleanup()


if __name__ == "__main__":
    main()
