"""The loop and the run folder, in one process and in worlds of several."""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fork_worlds import in_worlds

from mnist.cli import InputError
from mnist.data import load_mnist, split_validation
from mnist.distributed import World
from mnist.model import load_model
from mnist.runs.metrics import read_metrics
from mnist.training.config import TrainConfig
from mnist.training.job import hint_at_few_images, open_run
from mnist.training.loop import Plan, fit, schedule

WORLD = World(threads=1)
# 1,000 images to train on, in 5 steps of an epoch, of which the last is a partial one.
SMALL = {"hidden_sizes": (32, 24, 16, 12), "validation_size": 59_000, "batch_size": 220}


def small(tmp_path, data_dir, **settings):
    defaults = SMALL | {"runs_dir": tmp_path, "data_dir": data_dir, "run_name": "run"}
    return TrainConfig(**defaults | settings)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, data_dir) -> Path:
    """Runs of equal settings in worlds of several sizes, in one machine's memory or over a network,
    in float32 or float64."""
    runs = tmp_path_factory.mktemp("worlds")
    common = (
        f"--runs-dir {runs} --data-dir {data_dir} --precision fp32 --products torch --threads 1"
    )
    # 200 steps of 64 images: uneven slices on three ranks.
    long = f"{common} --validation-size 1200 --epochs 1 --log-every 50"
    # The last global batch has two images for three ranks: one slice is empty.
    tiny = f"{common} --validation-size 12900 --epochs 1 --batch-size 9 --hidden-sizes 9 8 7 6"
    # Two layers are large enough for half precision.
    half = f"{common} --validation-size 12000 --epochs 1 --precision bf16 --products onednn "
    half += "--hidden-sizes 96 704 32 16"
    distorted = f"{tiny} --averaging 0.9 --schedule cosine --warmup 0.1 --nesterov"
    distorted += " --rotation 12 --scaling 0.15 --shear 0.1 --shift 2 --elastic 1.2"
    distorted += " --thickness 0.7"
    tied = f"{tiny} --tied 0.5 --hidden-sizes 144 16 12 10 --optimizer adamw"
    float64, network = "train in float64", "train over a network"
    narrow = f"{long} --hidden-sizes 64 48 32 16"
    jobs = [(size, float64, f"{narrow} --run-name long64-{size}") for size in (1, 2, 3, 7)]
    for size in (2, 7):
        jobs.append((size, f"{float64} over a network", f"{narrow} --run-name far64-{size}"))
    jobs += [(size, float64, f"{distorted} --run-name distorted64-{size}") for size in (1, 2, 3)]
    jobs += [(size, float64, f"{tied} --run-name tied64-{size}") for size in (1, 2, 3)]
    for size in (2, 3):
        for name, options in {"long": long, "distorted": distorted}.items():
            jobs.append((size, "train", f"{options} --run-name {name}-{size}"))
            jobs.append((size, network, f"{options} --run-name far-{name}-{size}"))
        for name, job in {"half": "train", "far-half": network}.items():
            jobs += [(size, job, f"{half} --run-name {name}-{size}{again}") for again in "ab"]
    jobs.append((1, "train", f"{tiny} --run-name tiny-1"))
    in_worlds([(size, job, options.split()) for size, job, options in jobs])
    return runs


def open_folder(config):
    with ExitStack() as stack:
        return open_run(config, WORLD, stack)


@pytest.mark.parametrize(
    "name",
    [
        *("long64-2", "long64-3", "long64-7", "far64-2", "far64-7"),
        *("distorted64-2", "distorted64-3"),
        *("tied64-2", "tied64-3"),
    ],
)
def test_any_world_size_is_the_same_experiment(worlds, name):
    # In float64: in float32 one pair in three is 1e-2 apart after 200 steps, as a hidden value that
    # is zero but for rounding falls on either side of the ReLU.
    kind, size = name.split("-")
    alone = worlds / f"{kind.replace('far', 'long')}-1"
    expected = np.load(alone / "weights0.npy")
    for rank in range(int(size)):
        weights = np.load(worlds / name / f"weights{rank}.npy")
        assert weights.dtype == np.float64 and np.abs(weights - expected).max() < 1e-9
    for ours, theirs in zip(
        read_metrics(alone / "metrics.jsonl"),
        read_metrics(worlds / name / "metrics.jsonl"),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        for key in ("step", "epoch", "images", "learning_rate", "train/accuracy"):
            assert ours[key] == theirs[key]
        for key in ours.keys() & {"train/loss", "validation/loss"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_same_world_size_same_bytes(worlds, size):
    for name in ("half", "far-half"):
        one, again = (worlds / f"{name}-{size}{run}" / "model.safetensors" for run in "ab")
        assert one.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["long", "distorted"])
def test_one_machine_or_several_are_the_same_bytes_in_float32(worlds, name, size):
    near, far = (worlds / f"{kind}{name}-{size}" / "model.safetensors" for kind in ("", "far-"))
    assert near.read_bytes() == far.read_bytes()


def test_half_precision_over_a_network_trains_as_well(worlds):
    # What is rounded on its way is another sum, of the same size.
    for size in (2, 3):
        near, far = (
            read_metrics(worlds / f"{name}-{size}a" / "metrics.jsonl")[-1]
            for name in ("half", "far-half")
        )
        assert near["train/loss"] != far["train/loss"]
        assert near["train/loss"] == pytest.approx(far["train/loss"], rel=1e-2)


def test_environment_says_what_the_run_ran_on(worlds):
    environment = json.loads((worlds / "half-3a" / "environment.json").read_text())
    found = [environment[key] for key in ("world_size", "precision", "threads", "device")]
    assert found == [3, "bf16", 1, "cpu"]
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]


def test_rows_count_every_image_and_validate_on_the_rest(tmp_path, data_dir):
    config = small(tmp_path, data_dir, epochs=2, log_every=2)
    open_folder(config)
    model = fit(config, WORLD)
    rows = read_metrics(config.run_folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10]
    assert [row["images"] for row in rows] == [440, 880, 1000, 1220, 1660, 2000]
    assert [row["epoch"] for row in rows if "validation/loss" in row] == [1.0, 2.0]

    # The last validation again, by NumPy from the final weights.
    digits = load_mnist(data_dir, "train")
    _, held_out = split_validation(digits.labels, 59_000, config.seed)
    hidden = (digits.images[held_out].numpy().reshape(-1, 784) / 255.0 - 0.1307) / 0.3081
    weights = [parameter.detach().numpy().astype(np.float64) for parameter in model.parameters()]
    for index in range(5):
        hidden = hidden @ weights[2 * index].T + weights[2 * index + 1]
        hidden = np.maximum(hidden, 0) if index < 4 else hidden
    hidden -= hidden.max(1, keepdims=True)
    losses = np.log(np.exp(hidden).sum(1)) - hidden[np.arange(59_000), digits.labels[held_out]]
    correct = hidden.argmax(1) == digits.labels[held_out].numpy()
    assert rows[-1]["validation/loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert rows[-1]["validation/accuracy"] == pytest.approx(correct.mean(), abs=2 / 59_000)


def test_first_row_is_the_loss_before_learning(tmp_path, data_dir):
    config = small(tmp_path, data_dir, epochs=1, batch_size=1000)
    open_folder(config)
    fit(config, WORLD)
    (row,) = read_metrics(config.run_folder / "metrics.jsonl")
    assert row["train/loss"] == pytest.approx(math.log(10), abs=0.1)  # ten classes, by chance


def test_first_losses_are_those_that_were_recorded(tmp_path, data_dir):
    # Of a float32 run on one thread; machines differ in the last bits, which 20 steps keep below
    # 1e-5. A change beyond that means that an upgrade changes the numbers: find out which, then
    # write the new file by hand.
    config = small(tmp_path, data_dir, batch_size=110, epochs=2, log_every=1, precision="fp32")
    open_folder(config)
    fit(config, WORLD)
    found = [row["train/loss"] for row in read_metrics(config.run_folder / "metrics.jsonl")]
    golden = Path(__file__).with_name("golden_losses.txt")
    recorded = [float(text) for text in golden.read_text().split()]
    assert found == pytest.approx(recorded, rel=1e-5)
    assert len(recorded) == 20


def test_no_validation_split_trains_on_everything(tmp_path, data_dir):
    config = small(tmp_path, data_dir, epochs=1, validation_size=0, batch_size=6000)
    open_folder(config)
    fit(config, WORLD)
    (row,) = read_metrics(config.run_folder / "metrics.jsonl")
    assert row["images"] == 60_000 and "validation/loss" not in row


def test_divergence_is_said_at_once(tmp_path, data_dir):
    for name, settings in {
        "in the loss": {"log_every": 1},
        "in the validation": {"epochs": 1, "batch_size": 1000},
        "in the last step": {"epochs": 1, "batch_size": 60_000, "validation_size": 0},
    }.items():
        config = small(
            tmp_path, data_dir, run_name=name.split()[-1], learning_rate=1e30, **settings
        )
        open_folder(config)
        with pytest.raises(InputError, match=r"diverged.*--learning-rate below 1e\+30"):
            fit(config, WORLD)


def test_start_killed_at_once_does_not_block_its_name(tmp_path, data_dir):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.123").write_text("half")
    assert not open_folder(small(tmp_path, data_dir)).complete


def test_schedule_rises_and_falls_linearly():
    config = TrainConfig(schedule="triangular", warmup=0.2)
    shares = [schedule(progress, config) for progress in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert schedule(0.7, TrainConfig()) == 1.0
    assert schedule(0.0, TrainConfig(schedule="triangular", warmup=0)) == 1.0


def test_cosine_rises_linearly_and_falls_as_half_a_wave():
    config = TrainConfig(schedule="cosine", warmup=0.2)
    shares = [schedule(progress, config) for progress in (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)]
    assert shares == pytest.approx([0, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, 0])


def test_average_of_weights_forgets_the_first_ones_sooner():
    plan = Plan(600, TrainConfig(averaging=0.99))
    weights = [plan.averaging(step) for step in (1, 10, 990, 991, 5000)]
    assert weights == pytest.approx([10 / 11, 0.5, 0.01, 0.01, 0.01])
    assert Plan(600, TrainConfig()).averaging(7) == 0


def test_run_folder_of_other_settings_is_refused(tmp_path, data_dir):
    open_folder(small(tmp_path, data_dir))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    open_folder(small(tmp_path, data_dir, threads=2, log_every=3))
    with pytest.raises(InputError, match="--seed 0 there, 3 here; --epochs 25 there, 2 here"):
        open_folder(small(tmp_path, data_dir, seed=3, epochs=2))
    assert yaml.safe_load(before)["seed"] == 0


def test_run_of_an_earlier_version_goes_on_unless_a_newer_setting_is_used(tmp_path, data_dir):
    open_folder(small(tmp_path, data_dir))
    settings = tmp_path / "run" / "config.yaml"
    recorded = yaml.safe_load(settings.read_text())
    del recorded["averaging"]
    settings.write_text(yaml.safe_dump(recorded))
    with pytest.raises(InputError, match=r"--averaging 0.0 there, 0.9 here"):
        open_folder(small(tmp_path, data_dir, averaging=0.9))
    open_folder(small(tmp_path, data_dir))


def test_foreign_folder_is_refused_and_left_alone(tmp_path, data_dir):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a run folder"):
        open_folder(small(tmp_path, data_dir))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_folder_that_cannot_be_made_is_named(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--runs-dir .*/file is not a folder"):
        open_folder(small(tmp_path / "file", data_dir))


def test_model_of_a_run_is_loadable(worlds):
    assert load_model(worlds / "tiny-1" / "model.safetensors").hidden_sizes == (9, 8, 7, 6)


def test_processes_with_few_images_are_said_to_be_slower(capsys):
    for size, rank, batch_size, expected in (
        (1, 0, 64, ""),
        (2, 0, 128, ""),
        (2, 1, 64, ""),
        (3, 0, 188, "--batch-size 188 leaves each of 3 processes 63 images a step"),
    ):
        hint_at_few_images(TrainConfig(batch_size=batch_size), World(size=size, rank=rank))
        said = capsys.readouterr().err
        assert expected in said and bool(expected) == bool(said)
