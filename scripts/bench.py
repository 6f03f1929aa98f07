"""Speed, measured side by side: scripts/bench [PART ...], of

training, distortion, scoring, processes, accuracy, scaling, and, only when named, neighbour,
network (root, as it lays one), writing (of a --model) and reading (by a --model, of --photos).

What is compared is interleaved in rounds, and steps within a round, because absolute times wander
by a factor of two on a shared machine; ratios are medians of the rounds' ratios. Without words, all
parts (some ten minutes).
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_reading import Reader, changes, draw_coverage, groups, scores, speeds
from bench_worlds import TwoNetworks, Workers, usual_network
from bench_writing import doubt, normalising
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

from mnist.cli import InputError
from mnist.data import load_mnist, normalise
from mnist.distributed import World, connect
from mnist.evaluation.config import EvaluateConfig
from mnist.evaluation.inputs import open_mnist
from mnist.evaluation.scoring import score
from mnist.fetch import fetch_mnist
from mnist.model import MLP, load_model
from mnist.products import onednn_product, onednn_rounds, rounding_product, torch_product
from mnist.runs.metrics import read_metrics
from mnist.system import StopRequest
from mnist.training.config import TrainConfig, parse_train_config
from mnist.training.distortion import ELASTIC_SMOOTHNESS, Distortion
from mnist.training.job import open_run
from mnist.training.loop import fit
from mnist.training.step import Learner
from mnist.training.trial import faster_products

ROOT = Path(__file__).parents[1]
JOB = str(ROOT / "jobs/train.py")
LAUNCH = [sys.executable, "-P", "-m", "accelerate.commands.launch"]
IMAGES, BATCH, TEST_IMAGES = 60_000, 64, 10_000
STEPS = -(-IMAGES // BATCH)
GOAL = 0.9816  # what the original reached
SEED = 0
SLICE = 67  # steps that are timed in turn: a fourteenth of an epoch

Measure = Callable[[], float]
"""Does something once and returns the seconds it took."""


DEVICE = torch.device("cpu")  # what is measured on: main sets it


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(progress: str) -> None:
    """On a terminal, in place of what was shown before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


@dataclass
class Results:
    """Seconds by part and name, one per round, and ratios of them."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def interleave(self, part: str, measures: dict[str, Measure], rounds: int) -> None:
        """Measure everything once per round; a first round warms up."""
        found = self.seconds[part] = {name: [] for name in measures}
        for turn in range(rounds + 1):
            for name, measure in measures.items():
                show(f"{part}, round {turn} of {rounds}: {name}")
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    value = measure()
                if turn:
                    found[name].append(value)
        show("")

    def ratio(self, part: str, one: str, other: str) -> float:
        """The median, over the rounds, of one time against the other."""
        pairs = zip(self.seconds[part][one], self.seconds[part][other], strict=True)
        value = statistics.median(a / b for a, b in pairs)
        self.ratios[f"{part}: {one} / {other}"] = value
        return value

    def table(self, part: str, images: dict[str, int]) -> None:
        """Print seconds, and images per second of what has images."""
        print(f"\n{part:47} seconds   images/s")
        for name, values in self.seconds[part].items():
            median = statistics.median(values)
            speed = f"{images[name] / median:11,.0f}" if name in images else ""
            print(f"  {name:45} {median:7.3f}{speed}")


# -------------------------------------------------------------------------------- what others do


def loader(data_dir: Path, train: bool) -> DataLoader[Any]:
    """MNIST as it is usually fed: torchvision's dataset, transforms, DataLoader."""
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    data = datasets.MNIST(str(data_dir), train=train, transform=transform)
    return DataLoader(data, batch_size=BATCH if train else 1000, shuffle=train)


class UsualLoop:
    """The network, optimizer and loop as they are usually written, in fp32."""

    def __init__(self, data_dir: Path) -> None:
        torch.manual_seed(SEED)
        self.model = usual_network().to(DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.criterion = nn.CrossEntropyLoss()
        self.training, self.test = loader(data_dir, train=True), loader(data_dir, train=False)

    def epoch(self, steps: int | None = None) -> float:
        """Train on everything once, or for so many steps."""
        started = now()
        for images, labels in itertools.islice(self.training, steps):
            self.step(images.to(DEVICE), labels.to(DEVICE))
        return now() - started

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Learn from one batch."""
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(images), labels)
        loss.backward()
        self.optimizer.step()

    def bare_steps(self, autocast: bool) -> Measure:
        """A slice of steps on one batch, with a rate of 0 (see ``bare_steps``)."""
        images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
        images, labels = images.to(DEVICE), labels.to(DEVICE)
        loop = UsualLoop.__new__(UsualLoop)
        loop.model, loop.criterion = self.model, self.criterion
        loop.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

        def seconds() -> float:
            started = now()
            for _ in range(SLICE):
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                    loop.step(images, labels)
            return now() - started

        return seconds

    @torch.no_grad()
    def score(self) -> float:
        """Loss and accuracy over the test images; ``self.accuracy`` is the latter."""
        started, loss, correct = now(), 0.0, 0
        for images, labels in self.test:
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            logits = self.model(images)
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
        self.accuracy = correct / TEST_IMAGES
        return now() - started


# ---------------------------------------------------------------------------------- what we do


def our_training(config: TrainConfig, world: World, stop: StopRequest | None = None) -> Measure:
    """The real loop, as its own metrics time it: training without validation and files."""
    config = replace(config, fresh=True)

    def seconds() -> float:
        with ExitStack() as stack:
            fit(config, world, open_run(config, world, stack), stop)
        return float(read_metrics(config.run_folder / "metrics.jsonl")[-1]["seconds"])

    return seconds


class InTurn(StopRequest):
    """Is asked at every step of a training whether to stop, and lets other measures run instead,
    between its slices. Adds up the seconds of all: of ``STEPS - SLICE`` steps of an epoch."""

    def __init__(self, others: dict[str, Measure]) -> None:
        self.others = others
        self.steps, self.since = 0, 0.0
        self.seconds = dict.fromkeys(("ours, in its epoch", *others), 0.0)

    @property
    def requested(self) -> bool:  # type: ignore[override]
        if self.steps % SLICE == 0:
            if self.steps:
                self.seconds["ours, in its epoch"] += now() - self.since
                for name, measure in self.others.items():
                    self.seconds[name] += measure()
            self.since = now()
        self.steps += 1
        return False


def bare_steps(world: World, batch: int = BATCH, steps: int = SLICE) -> Measure:
    """Steps of the same model and optimizer on one fixed batch.

    With a rate of 0: learning one batch by heart ends in denormal numbers, which are slow.
    """
    config = TrainConfig(batch_size=batch)
    kind = faster_products(config, world)
    learner = Learner(MLP(config.hidden_sizes).initialise(0), config, world, kind)
    images = torch.randn(batch, 784).to(world.device, learner.input_dtype)
    labels = torch.randint(0, 10, (batch,)).to(world.device)

    def seconds() -> float:
        started = now()
        for _ in range(steps):
            learner.step(images, labels, batch, 0.0)
        return now() - started

    return seconds


def bare_products(dtype: torch.dtype, batch: int, times: int, train: bool) -> Measure:
    """The matrix products alone, each made in the fastest of the ways that there are."""
    widths = (784, *TrainConfig().hidden_sizes, 10)
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(outputs, inputs, device=DEVICE) for inputs, outputs in pairs]
    inputs = [torch.randn(batch, width, device=DEVICE) for width in widths[:-1]]
    deltas = [torch.randn(batch, width, device=DEVICE) for width in widths[1:]]
    operands = [(x, w.t()) for x, w in zip(inputs, weights, strict=True)]
    if train:
        operands += list(zip(deltas[1:], weights[1:], strict=True))
        operands += [(d.t(), x) for d, x in zip(deltas, inputs, strict=True)]

    def fastest(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
        ways: list[Callable[[], torch.Tensor]] = []
        out = torch.empty(len(a), b.shape[1], device=DEVICE)
        is_cpu = DEVICE.type == "cpu"
        for kind in {torch.float32, dtype}:
            a_, b_, out_ = a.to(kind), b.to(kind), out.to(kind)
            products = (torch_product, onednn_product) if is_cpu else (torch_product,)
            ways += [partial(product, a_, b_, None, out_) for product in products]
        if is_cpu and dtype == torch.bfloat16 and onednn_rounds():
            ways.append(partial(rounding_product, a, b, None, out))
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(50):
            for way, spent in zip(ways, times, strict=True):
                started = now()
                way()
                spent.append(now() - started)
        medians = list(map(statistics.median, times))
        return ways[medians.index(min(medians))]

    multiply = [fastest(a, b) for a, b in operands]

    def seconds() -> float:
        started = now()
        for _ in range(times):
            for each in multiply:
                each()
        return now() - started

    return seconds


def our_distortion(data_dir: Path, world: World, config: TrainConfig, count: int) -> Measure:
    """Distort ``count`` images of the training set, batch by batch."""
    size = config.batch_size
    images = normalise(load_mnist(data_dir, "train").images[:count].to(DEVICE), world.precision)
    distort = Distortion(config, world.device)

    def seconds() -> float:
        started = now()
        for step, batch in enumerate(images.split(size)):
            distort(batch, step, len(batch), slice(0, len(batch)))
        return now() - started

    return seconds


def usual_distortion(data_dir: Path, config: TrainConfig, count: int) -> Measure:
    """The same distortions by torchvision, image by image, as a dataset's transform does it."""
    shift = config.shift / 28
    # Its noise is uniform, and its displacements are halves of an image's 28 pixels over 28.
    alpha = config.elastic * 4 * math.sqrt(3 * math.pi) * ELASTIC_SMOOTHNESS
    distort = v2.Compose(
        [
            v2.RandomAffine(
                config.rotation,
                translate=(shift, shift),
                scale=(1 - config.scaling, 1 + config.scaling),
                shear=math.degrees(math.atan(config.shear)),
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.ElasticTransform(alpha=alpha, sigma=ELASTIC_SMOOTHNESS),
        ]
    )
    images = load_mnist(data_dir, "train").images[:count, None]

    def seconds() -> float:
        started = time.perf_counter()
        for image in images:
            distort(image)
        return time.perf_counter() - started

    return seconds


def our_scoring(data_dir: Path, world: World, part: Path | None) -> Measure:
    """The evaluator's loop over the test images, with or without predictions.csv."""
    inputs = open_mnist(data_dir, "test", 0, 0)
    model = MLP(TrainConfig().hidden_sizes).to(DEVICE)
    return lambda: score(model, inputs, world, EvaluateConfig().batch_size, part).seconds


def process(*words: str) -> Measure:
    """A whole process, from the command to its end."""

    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        return time.perf_counter() - started

    return seconds


# --------------------------------------------------------------------------------- the parts


def training(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """An epoch of all 60,000 images, the step without its feeding, the products of the step."""
    common = ["--validation-size", "0", "--epochs", "1", "--data-dir", str(options.data_dir)]
    auto = parse_train_config([*common, "--runs-dir", str(folder)])
    fast = parse_train_config(["--recipe", "fast", "--data-dir", str(options.data_dir)])
    usual = UsualLoop(options.data_dir)
    native = connect(auto)
    configs = {
        name: replace(auto, precision=name, runs_dir=folder / name)
        for name in dict.fromkeys(("fp32", native.precision_name))  # one where auto is fp32
    }
    worlds = {name: connect(config) for name, config in configs.items()}

    measures = {
        "DataLoader loop fp32": usual.epoch,
        **{f"ours {name}": our_training(configs[name], worlds[name]) for name in configs},
        "recipe fast, all its training": our_training(
            replace(fast, runs_dir=folder / "fast"), native
        ),
    }
    results.interleave("training", measures, options.rounds)
    images = dict.fromkeys(measures, IMAGES)
    images["recipe fast, all its training"] = 55_000 * fast.epochs
    results.table("training", images)
    for name in configs:
        times = results.ratio("training", "DataLoader loop fp32", f"ours {name}")
        print(f"  {name}: {times:.1f} times the DataLoader loop")

    for name, world in worlds.items():
        steps_in_turn(results, options.rounds, configs[name], world, usual)


def steps_in_turn(
    results: Results, rounds: int, config: TrainConfig, world: World, usual: UsualLoop
) -> None:
    """The steps of an epoch, the same without their feeding, autograd's, the products of a step."""
    autograd = "autograd" if config.precision == "fp32" else "autograd + autocast"
    others = {
        "ours, bare": bare_steps(world),
        f"{autograd}, bare": usual.bare_steps(autocast=config.precision != "fp32"),
        "products alone": bare_products(world.precision, BATCH, SLICE, train=True),
    }
    part = f"{STEPS - SLICE} steps in {config.precision}, in turn"
    seconds: dict[str, float] = {}

    def epoch() -> float:
        """Measures all; the other measures tell what it found."""
        in_turn = InTurn(others)
        our_training(config, world, in_turn)()
        seconds.update(in_turn.seconds)
        return seconds["ours, in its epoch"]

    told = {name: partial(seconds.__getitem__, name) for name in others}
    measures = {"ours, in its epoch": epoch, **told}
    results.interleave(part, measures, rounds)
    results.table(part, dict.fromkeys(measures, (STEPS - SLICE) * BATCH))
    feeding = results.ratio(part, "ours, in its epoch", "ours, bare")
    against = results.ratio(part, "ours, bare", f"{autograd}, bare")
    share = results.ratio(part, "products alone", "ours, bare")
    print(
        f"  feeding costs {feeding - 1:.1%}; our step takes {against:.2f} of the time of "
        f"{autograd}'s, and {share:.0%} of it is products"
    )


def distortion(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """What recipe record does to every image before it learns from it."""
    config = parse_train_config(["--recipe", "record"])
    world = connect(config)
    counts = {"torchvision, image by image": 500, "ours": 15_360}
    usual, ours = counts
    measures = {
        usual: usual_distortion(options.data_dir, config, counts[usual]),
        ours: our_distortion(options.data_dir, world, config, counts[ours]),
    }
    results.interleave("distortion", measures, options.rounds)
    results.table("distortion", counts)
    costs = {
        name: 1e6 * statistics.median(results.seconds["distortion"][name]) / count
        for name, count in counts.items()
    }
    results.more["distortion, us an image"] = costs
    print(f"  {costs[ours]:.1f} us an image, torchvision {costs[usual]:.0f} us")


def scoring(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """The 10,000 test images in fp32."""
    world = connect(TrainConfig(precision="fp32"))
    size = EvaluateConfig().batch_size
    measures = {
        "DataLoader loop, scoring": UsualLoop(options.data_dir).score,
        "ours, scoring": our_scoring(options.data_dir, world, None),
        "ours with predictions.csv": our_scoring(options.data_dir, world, folder / "rows.csv"),
        "products alone": bare_products(torch.float32, size, round(TEST_IMAGES / size), False),
    }
    results.interleave("scoring", measures, 3 * options.rounds)
    results.table("scoring", dict.fromkeys(measures, TEST_IMAGES))
    times = results.ratio("scoring", "DataLoader loop, scoring", "ours, scoring")
    share = results.ratio("scoring", "products alone", "ours, scoring")
    print(f"  {times:.1f} times the DataLoader loop; {share:.0%} of it is products")


def processes(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """Whole processes, and what happens before the first step, as seen from outside."""
    empty, torch_alone = folder / "empty.py", folder / "torch_alone.py"
    empty.touch()
    torch_alone.write_text("import torch\n")
    runs = itertools.count()
    trained: dict[str, list[float]] = {}

    def fast(mode: str) -> Measure:
        """A whole process; what its training took is kept aside."""

        def seconds() -> float:
            parent = folder / f"runs{next(runs)}"
            words = [*LAUNCH, JOB, "--recipe", "fast", "--data-dir", str(options.data_dir)]
            whole = process(*words, "--wandb", mode, "--runs-dir", str(parent))()
            (metrics,) = parent.glob("*/metrics.jsonl")
            trained.setdefault(mode, []).append(read_metrics(metrics)[-1]["seconds"])
            return whole

        return seconds

    modes = {"disabled": "--recipe fast --wandb disabled", "offline": "with --wandb offline"}
    alone = "of a script that imports torch"
    measures = {
        "accelerate launch of an empty script": process(*LAUNCH, str(empty)),
        alone: process(*LAUNCH, str(torch_alone)),
        **{name: fast(mode) for mode, name in modes.items()},
        "import torch": process(sys.executable, "-c", "import torch"),
        "import what training needs": process(sys.executable, "-c", "import mnist.training.job"),
    }
    results.interleave("processes", measures, options.rounds)
    seconds = results.seconds["processes"]
    for mode, name in modes.items():
        training = trained[mode][1:]  # without the round that warms up
        seconds[f"{name}, less training"] = [
            whole - part for whole, part in zip(seconds[name], training, strict=True)
        ]
    results.table("processes", {})
    for name in modes.values():
        ratio = results.ratio("processes", f"{name}, less training", alone)
        print(f"  {name} less its training takes {ratio:.2f} times a script that imports torch")
    stages = [start_up(options, folder / f"start{turn}") for turn in range(options.rounds)]
    medians = {name: statistics.median(stage[name] for stage in stages) for name in stages[0]}
    results.more["start-up"] = medians
    print(f"\n{'from the command to the first step':47} seconds")
    for name, value in medians.items():
        print(f"  {name:45} {value:7.3f}")


def start_up(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """When a launched job's process, its run folder and its first row appear, one after another."""
    words = [*LAUNCH, JOB, "--log-every", "1", "--run-name", "run", "--runs-dir", str(folder)]
    started = time.time()
    launcher = subprocess.Popen(
        [*words, "--data-dir", str(options.data_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def until(condition: Callable[[], Any]) -> float:
        while not condition():
            assert launcher.poll() is None, "the job has ended"
            time.sleep(0.002)
        return time.time()

    rows = folder / "run/metrics.jsonl"
    moments = [
        started,
        until(lambda: psutil.Process(launcher.pid).children()),
        until((folder / "run/environment.json").exists),
        until(lambda: rows.exists() and rows.stat().st_size),
    ]
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    launcher.wait()
    names = ("launcher's imports", "job's imports, data, world", "data in memory, first step")
    return {name: b - a for name, (a, b) in zip(names, itertools.pairwise(moments), strict=True)}


def accuracy(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """Seconds of training until the test accuracy at an epoch's end reaches 98.16%."""
    found: dict[str, tuple[float, float] | None] = {}
    for recipe in ("fast", "baseline"):
        words = ["--recipe", recipe, "--seed", str(SEED), "--keep-checkpoints", "100"]
        words += ["--runs-dir", str(folder / "goal"), "--data-dir", str(options.data_dir)]
        config = parse_train_config(words)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            our_training(config, connect(config))()
        found[f"recipe {recipe}"] = first_good_epoch(config, options.data_dir)
    loop, seconds = UsualLoop(options.data_dir), 0.0
    found["DataLoader loop"] = None
    for epoch in range(1, TrainConfig().epochs + 1):
        show(f"accuracy: DataLoader loop, epoch {epoch}")
        seconds += loop.epoch()
        loop.score()
        if loop.accuracy >= GOAL:
            found["DataLoader loop"] = (seconds, epoch)
            break
    show("")
    print(f"\n{f'training until the test accuracy is {GOAL:.2%}':47} seconds   epochs")
    for name, reached in found.items():
        shown = f"{reached[0]:7.2f}  {reached[1]:7.0f}" if reached else "  never"
        print(f"  {name:45} {shown}")
    slow, fast = found["DataLoader loop"], found["recipe fast"]
    if slow and fast:
        results.ratios["time to 98.16%: DataLoader loop / fast"] = slow[0] / fast[0]
        print(f"  fast is there {slow[0] / fast[0]:.0f} times sooner than the DataLoader loop")
    results.more["time to 98.16%"] = found


def first_good_epoch(config: TrainConfig, data_dir: Path) -> tuple[float, float] | None:
    """When a run's checkpoints reach the goal; nothing in the run knows of this."""
    inputs = open_mnist(data_dir, "test", 0, 0)
    for row in read_metrics(config.run_folder / "metrics.jsonl"):
        checkpoint = config.run_folder / f"checkpoints/step-{row['step']:09d}"
        if checkpoint.exists():  # none is due but at the end of an epoch
            model = load_model(checkpoint / "model.safetensors")
            tally = score(model, inputs, World(), 1000).tally
            if tally.confusion.trace() / TEST_IMAGES >= GOAL:
                return row["seconds"], row["epoch"]
    return None


EPOCHS = {64: 1, 256: 2, 1024: 3}
"""Of a measurement, by the images that each of two processes has in a step."""


def scaling(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """One process of two threads against two of one, at the same global batch; and against
    Accelerate's DistributedDataParallel."""
    native = connect(TrainConfig()).precision_name
    precisions = list(dict.fromkeys(("fp32", native)))
    with ExitStack() as stack:
        one, two, ddp = (
            stack.enter_context(Workers(kind, size, 2 // size, native))
            for kind, size in (("ours", 1), ("ours", 2), ("ddp", 2))
        )
        for images, epochs in EPOCHS.items():
            order = {"batch_size": 2 * images, "epochs": epochs, "data_dir": str(options.data_dir)}
            part = f"{images} images of each of two"
            measures: dict[str, Measure] = {}
            for name in precisions:
                for world, said in ((one, "1 process, 2 threads"), (two, "2 processes")):
                    own = {"folder": str(folder), "precision": name}
                    measures[f"{said}, {name}"] = world.measure(**order, **own)
            measures[f"DDP, 2 processes, {native}"] = ddp.measure(**order)
            results.interleave(part, measures, options.rounds)
            results.table(part, dict.fromkeys(measures, epochs * IMAGES))
            for name in precisions:
                ratio = results.ratio(part, f"1 process, 2 threads, {name}", f"2 processes, {name}")
                print(f"  {name}: two processes are {ratio:.2f} times as fast as one")
            ratio = results.ratio(part, f"DDP, 2 processes, {native}", f"2 processes, {native}")
            print(f"  {native}: {ratio:.2f} times as fast as Accelerate's DDP")


RATES = {"10 Gbit/s": "10gbit", "1 Gbit/s": "1gbit"}
LATENCY = 30e-6  # seconds of a message between real machines, besides what is measured here


def network(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """Two processes with a network between them, against Accelerate's DistributedDataParallel; and
    what follows from the parts for many machines."""
    try:
        networks = TwoNetworks()
    except RuntimeError as error:
        print(f"\nnetwork: skipped, as it takes root: {error}")
        return
    native = connect(TrainConfig(threads=1))
    name = native.precision_name
    with networks, ExitStack() as stack:
        alone = stack.enter_context(Workers("ours", 1, 1, name))
        ours, ddp = (
            stack.enter_context(Workers(kind, 2, 1, name, networks.places, networks.address))
            for kind in ("ours", "ddp")
        )
        for rate, words in RATES.items():
            networks.set_rate(words)
            for images in EPOCHS:
                order = {"data_dir": str(options.data_dir)}
                own = order | {"folder": str(folder)}
                part = f"{images} images each, {rate}, {name}"
                one, two, other = "1 process of half the batch", "2 processes", "DDP, 2 processes"
                measures = {
                    one: alone.measure(**own, batch_size=images),
                    two: ours.measure(**own, batch_size=2 * images),
                    other: ddp.measure(**order, batch_size=2 * images),
                }
                results.interleave(part, measures, options.rounds)
                results.table(part, dict.fromkeys(measures, IMAGES))
                faster = results.ratio(part, one, two)
                against = results.ratio(part, other, two)
                print(
                    f"  two are {faster:.2f} times as fast as one alone, and {against:.2f} times "
                    "as fast as DDP"
                )
            numbers = sum(p.numel() for p in MLP(TrainConfig().hidden_sizes).parameters())
            few, all_ = {"exchanges": 1000, "numbers": 16}, {"exchanges": 50, "numbers": numbers}
            part = f"exchanges, {rate}"
            exchanges = {
                "1,000 of 16 numbers": ours.measure(**few),
                "CPU time of as many, 50 at once": ours.measure(
                    exchanges=20, numbers=16, at_once=50, cpu=True
                ),
                "50 of the gradient": ours.measure(**all_),
            }
            results.interleave(part, exchanges, options.rounds)
            results.table(part, {})
            predict(results, rate, name)


def predict(results: Results, rate: str, precision: str) -> None:
    """Weak scaling, from what was measured: a step's computation, the time and the CPU time of a
    small message and the time of a gradient; a process per machine, nothing overlapped."""
    seconds = {
        name: statistics.median(values)
        for name, values in results.seconds[f"exchanges, {rate}"].items()
    }
    message = seconds["1,000 of 16 numbers"] / 1000
    cpu = seconds["CPU time of as many, 50 at once"] / 1000
    gradient = seconds["50 of the gradient"] / 50 - message
    head = f"predicted efficiency, {rate}, {1e6 * LATENCY:.0f} us more a message"
    print(f"\n{head:58}" + "".join(f"{images:>7,}" for images in EPOCHS) + "  images each")
    predicted = results.more.setdefault("predicted efficiency", {})[rate] = {}
    for size in (2, 8, 16, 64, 256, 1024):
        # Two processes exchange all; of more each sends n - 1 shares, twice.
        turns, sent = (1, 1.0) if size == 2 else (2, 2 * (size - 1) / size)
        each = turns * (message + LATENCY + (size - 2) * cpu) + sent * gradient
        row = predicted[size] = {}
        for images in EPOCHS:
            part = results.seconds[f"{images} images each, {rate}, {precision}"]
            epoch = statistics.median(part["1 process of half the batch"])
            step = epoch / -(-IMAGES // images)
            row[images] = step / (step + each)
        shown = "".join(f"{row[images]:7.0%}" for images in EPOCHS)
        print(f"{f'  {size:5,} machines':58}{shown}")


NEIGHBOURS = {
    "a busy loop": "while True: pass",
    "one that works half of the time": """
import time
while True:
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end: pass
    time.sleep(0.05)
""",
}


def neighbour(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """Training alone, and beside processes that want the same cores."""
    usual, steps, runs = UsualLoop(options.data_dir), 100, itertools.count()
    words = ["--validation-size", "0", "--epochs", "2", "--data-dir", str(options.data_dir)]
    native = connect(parse_train_config(words)).precision_name
    alone: dict[str, Measure] = {"DataLoader loop fp32": lambda: usual.epoch(steps)}
    for precision in dict.fromkeys(("fp32", native)):
        config = parse_train_config([*words, "--precision", precision])
        config = replace(config, runs_dir=folder / precision)
        alone[f"ours {precision}"] = our_training(config, connect(config))
    images = {name: 2 * IMAGES if "ours" in name else BATCH * steps for name in alone}

    def beside(code: str, measure: Measure) -> Measure:
        def seconds() -> float:
            other = subprocess.Popen([sys.executable, "-c", code])
            time.sleep(0.3)
            try:
                return measure()
            finally:
                other.kill()
                other.wait()

        return seconds

    measures = dict(alone)
    for kind, code in NEIGHBOURS.items():
        measures |= {f"{name}, {kind}": beside(code, each) for name, each in alone.items()}
        images |= {f"{name}, {kind}": images[name] for name in alone}
    results.interleave("neighbour", measures, options.rounds)
    results.table("neighbour", images)
    for name in alone:
        for kind in NEIGHBOURS:
            ratio = results.ratio("neighbour", name, f"{name}, {kind}")
            print(f"  {name} beside {kind}: {ratio:.2f} of its speed alone")
    for name in list(alone)[1:]:
        kind = next(iter(NEIGHBOURS))
        ratio = results.ratio("neighbour", f"DataLoader loop fp32, {kind}", f"{name}, {kind}")
        print(
            f"  {name} beside {kind}: {ratio * images[name] / (BATCH * steps):.0f} times the loop"
        )

    os.environ.pop("OMP_NUM_THREADS", None)  # which connect has set for this process alone

    def fast(count: int) -> Measure:
        """Runs of ``fast`` at once: the seconds that all their trainings take."""

        def seconds() -> float:
            places = [folder / f"fast{next(runs)}" for _ in range(count)]
            job = [sys.executable, JOB, "--recipe", "fast", "--evaluate", "none"]
            job += ["--wandb", "disabled", "--run-name", "run", "--data-dir", str(options.data_dir)]
            started = [
                subprocess.Popen([*job, "--runs-dir", str(place)], stdout=subprocess.DEVNULL)
                for place in places
            ]
            assert not any(process.wait() for process in started)
            return max(
                float(read_metrics(place / "run/metrics.jsonl")[-1]["seconds"]) for place in places
            )

        return seconds

    one_by_one, together = "two runs of fast, one by one", "two runs of fast at once"
    pair = {one_by_one: lambda: fast(1)() + fast(1)(), together: fast(2)}
    results.interleave("two runs", pair, options.rounds)
    results.table("two runs", {})
    ratio = results.ratio("two runs", together, one_by_one)
    print(f"  two runs at once take {ratio:.2f} times as long as one by one")


def writing(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """Digits normalised in a second on one core; with --model, what it accepts and rejects."""
    found = results.more["writing, digits a second"] = normalising(options.rounds)
    print(
        "\nwriting, one core", *(f"  {n:18} {v:8,.0f} a second" for n, v in found.items()), sep="\n"
    )
    if options.model is None:
        return
    shares = results.more["writing, doubt"] = doubt(options.model, options.data_dir)
    print(f"  MNIST's test digits accepted {shares['accepted']:.2%}")
    print(f"  no digits rejected           {shares['rejected']:.2%}, of which")
    for kind, share in shares["by kind"].items():
        print(f"    {kind:16} {share:.2%}")


PARTS = {
    part.__name__: part for part in (training, distortion, scoring, processes, accuracy, scaling)
}


def reading(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """How well the numbers of --photos are read, and how fast."""
    if options.model is None or options.photos is None:
        raise InputError("reading takes --model FILE and --photos FOLDER")
    torch.set_num_threads(1)
    reader = Reader(options.model)
    curves = {}
    for group, found in scores(reader, options.photos).items():
        curve = found.pop("curve")
        if found["files"] >= 10 and curve:
            curves[group] = curve
        results.more[f"reading, {group}"] = found
        print(f"\nreading, {group}", *(f"  {n:24} {_shown(v)}" for n, v in found.items()), sep="\n")
    if options.figure is not None:
        draw_coverage(curves, options.figure)
    first = next(iter(groups(options.photos)))
    for name, found in (
        (f"reading, {first}: digits that differ", changes(reader, options.photos, first)),
        ("reading, one thread", speeds(options.model, _largest(options.photos), options.rounds)),
    ):
        results.more[name] = found
        print(f"\n{name}", *(f"  {n:24} {_shown(v)}" for n, v in found.items()), sep="\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _largest(folder: Path) -> Path:
    photos = [photo for some in groups(folder).values() for photo, truth in some if truth]
    return max(photos, key=lambda photo: photo.stat().st_size)


ALL = {**PARTS, "neighbour": neighbour, "network": network, "writing": writing, "reading": reading}
OF_CPUS = {"scaling", "neighbour", "network", "writing", "reading"}


def settle_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Measure on what was asked for, in this process and in those that it starts."""
    global DEVICE
    DEVICE = torch.device(options.device)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    if unfit := set(options.parts) & OF_CPUS:
        parser.error(f"--device cuda: {', '.join(sorted(unfit))} measures CPUs")
    options.parts = options.parts or [part for part in PARTS if part not in OF_CPUS]


def main() -> None:
    """Measure, and print the tables; --json FILE keeps every measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(ALL)}; default: all but the last four",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="to measure on")
    parser.add_argument("--data-dir", type=Path, default=TrainConfig().data_dir)
    parser.add_argument("--model", type=Path, help="of writing and reading")
    parser.add_argument("--photos", type=Path, help="of reading: a folder with a truth.csv")
    parser.add_argument("--figure", type=Path, help="of reading: accuracy over coverage, a PNG")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(ALL):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: takes {', '.join(ALL)}")
    settle_device(parser, options)
    if options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    options.data_dir = options.data_dir.resolve()
    fetch_mnist(options.data_dir)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary:
        # Processes find their modules compiled, as a user's do from the second start on.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = f"{temporary}/compiled"
        world = connect(TrainConfig())
        machine = {
            "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
            "threads": world.threads,
            "torch": torch.__version__,
            "rounds": options.rounds,
        }
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        for name in options.parts or PARTS:
            folder = Path(temporary) / name
            folder.mkdir()
            ALL[name](results, options, folder)
    if options.json:
        contents = {"machine": machine} | results.__dict__
        options.json.write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    main()
