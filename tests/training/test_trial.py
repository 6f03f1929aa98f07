"""Whose matrix products a run takes: measured once, and then the run's own."""

import pytest
import torch
import yaml
from fork_worlds import loader_of_first

from mnist.cli import InputError
from mnist.distributed import World
from mnist.figures import Painter
from mnist.runs.mirror import NoMirror
from mnist.training import job, loop, trial
from mnist.training.config import TrainConfig, parse_train_config
from mnist.training.trial import faster_products

SMALL = {"hidden_sizes": (32, 24, 16, 12), "validation_size": 1000, "batch_size": 500, "epochs": 1}


class Clock:
    """A learner's steps, by the products that it has, and a clock that only they move.

    Of so many threads, one has no core all the time.
    """

    def __init__(self, monkeypatch, seconds, disturbed_threads=None):
        self.now, self.cpu, self.steps = 0.0, 0.0, 0
        clock = self

        class Learner:
            input_dtype = torch.float32

            def __init__(self, model, config, world, products):
                self.products = products

            def step(self, images, labels, batch_size, rate):
                assert len(images) == len(labels) == batch_size and rate == 0
                took, threads = seconds[self.products](clock.steps), torch.get_num_threads()
                clock.now += took
                clock.cpu += took * (threads - (threads == disturbed_threads))
                clock.steps += 1

        monkeypatch.setattr(trial, "Learner", Learner)
        monkeypatch.setattr(trial.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(trial.time, "process_time", lambda: self.cpu)


@pytest.mark.parametrize(
    ("torch_ms", "onednn_ms", "precision", "threads", "expected"),
    [
        (2, 1, torch.float32, 1, "onednn"),
        (1, 2, torch.float32, 1, "torch"),
        (1.05, 1, torch.float32, 1, "torch"),  # a near-tie
        (1.05, 1, torch.float32, 2, "torch"),
        (1, 1.05, torch.bfloat16, 1, "onednn"),
        (1, 1.4, torch.bfloat16, 2, "onednn"),
        (1, 1.6, torch.bfloat16, 2, "torch"),
        (1, 1.4, torch.bfloat16, 1, "torch"),  # whose bits depend on threads, and there is one
    ],
)
def test_the_faster_are_taken_and_of_near_ties_always_the_same(
    monkeypatch, torch_ms, onednn_ms, precision, threads, expected
):
    monkeypatch.setattr(trial.torch, "get_num_threads", lambda: threads)

    def milliseconds(usual):
        # The first makes its kernels; now and then something else has the core.
        return lambda step: (300 if step < 2 else 50 if step % 5 == 0 else usual) / 1000

    seconds = {"torch": milliseconds(torch_ms), "onednn": milliseconds(onednn_ms)}
    clock = Clock(monkeypatch, seconds)
    assert faster_products(TrainConfig(), World(precision=precision)) == expected
    assert 8 <= clock.steps < 60


def test_steps_are_timed_as_long_as_is_needed_and_no_longer(monkeypatch):
    seconds = dict.fromkeys(("torch", "onednn"), lambda _: 1.0)
    clock = Clock(monkeypatch, seconds)
    faster_products(TrainConfig(), World())
    assert clock.steps == 8


def test_beside_others_the_steps_of_one_thread_decide(monkeypatch):
    def seconds(alone, beside):
        return lambda _: alone if torch.get_num_threads() == 1 else beside

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        steps = {"torch": seconds(0.002, 0.004), "onednn": seconds(0.004, 0.001)}
        Clock(monkeypatch, steps)
        assert faster_products(TrainConfig(), World()) == "onednn"
        Clock(monkeypatch, steps, disturbed_threads=2)
        assert faster_products(TrainConfig(), World()) == "torch"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_real_steps_are_timed():
    assert faster_products(TrainConfig(**SMALL), World()) in ("torch", "onednn")


def settings(folder, data_dir, **more):
    own = {"runs_dir": folder, "data_dir": data_dir, "run_name": "run", "evaluate": "none"}
    return TrainConfig(**SMALL | own | {"precision": "fp32"} | more)


@pytest.fixture
def measured(monkeypatch):
    """What the trial says, and how often it was asked."""
    monkeypatch.setattr(loop, "load_mnist", loader_of_first(2000))
    monkeypatch.setattr(job, "connect", lambda *_: World())
    asked = []

    def fake(config, world):
        asked.append(world.precision_name)
        return "onednn"

    monkeypatch.setattr(job, "faster_products", fake)
    return asked


def train(config):
    with Painter() as painter:
        job.train(config, painter, NoMirror())
    return (config.run_folder / "model.safetensors").read_bytes()


def test_auto_is_settled_before_the_first_step_and_stays(tmp_path, data_dir, measured):
    config = settings(tmp_path, data_dir)
    model = train(config)
    recorded = yaml.safe_load((config.run_folder / "config.yaml").read_text())
    assert recorded["products"] == "onednn" and measured == ["fp32"]
    (config.run_folder / "model.safetensors").unlink()
    assert train(config) == model and measured == ["fp32"]  # not measured again
    file = str(config.run_folder / "config.yaml")
    repeated = parse_train_config(["--config", file, "--run-name", "again"])
    assert repeated.products == "onednn"
    assert train(repeated) == model and measured == ["fp32"]


def test_what_is_asked_for_is_not_measured_and_is_the_run_s(tmp_path, data_dir, measured):
    train(settings(tmp_path, data_dir, products="torch"))
    assert not measured
    with pytest.raises(InputError, match="--products torch there, onednn here"):
        train(settings(tmp_path, data_dir, products="onednn"))
    train(settings(tmp_path, data_dir))  # auto: what it has


def test_a_run_of_an_earlier_version_is_measured_when_it_goes_on(tmp_path, data_dir, measured):
    config = settings(tmp_path, data_dir)
    train(config)
    path = config.run_folder / "config.yaml"
    recorded = yaml.safe_load(path.read_text())
    del recorded["products"]
    path.write_text(yaml.safe_dump(recorded))
    (config.run_folder / "model.safetensors").unlink()
    train(config)
    assert len(measured) == 2
    assert yaml.safe_load(path.read_text())["products"] == "onednn"


def test_the_name_of_a_run_does_not_depend_on_its_products(tmp_path):
    names = {TrainConfig(products=kind).run_folder for kind in ("auto", "torch", "onednn")}
    assert len(names) == 1
