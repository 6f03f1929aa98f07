"""What a GPU changes: half precision with its loss scale, going on, scoring, distortions."""

import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from fork_worlds import StopAt, loader_of_first
from torch.nn import functional

from mnist.data import load_mnist, normalise
from mnist.distributed import World
from mnist.evaluation.scoring import predict
from mnist.model import MLP
from mnist.runs.metrics import read_metrics
from mnist.training import loop
from mnist.training.config import TrainConfig
from mnist.training.distortion import Distortion
from mnist.training.job import open_run
from mnist.training.loop import fit
from mnist.training.step import Learner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
DEVICE = torch.device("cuda")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def world(precision=torch.float32):
    return World(device=DEVICE, precision=precision)


def digits(data_dir, count=256):
    train = load_mnist(data_dir, "train")
    return train.images[:count], train.labels[:count]


@pytest.fixture
def train(monkeypatch, data_dir, tmp_path):
    """Train on 4,000 images; returns the final weights and the rows."""
    monkeypatch.setattr(loop, "load_mnist", loader_of_first(5000))

    def run(name, precision, stop=None, **settings):
        config = TrainConfig(
            **{
                "precision": precision,
                "validation_size": 1000,
                "epochs": 3,
                "checkpoint_every": 10,
                "runs_dir": tmp_path,
                "data_dir": data_dir,
                "run_name": name,
            }
            | settings
        )
        here = world(HALVES.get(precision, torch.float32))
        with ExitStack() as stack:
            model = fit(config, here, open_run(config, here, stack), stop)
        weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
        return weights, read_metrics(config.run_folder / "metrics.jsonl")

    return run


@pytest.mark.parametrize("precision", ["fp32", *HALVES])
def test_training_learns_as_on_a_cpu(train, precision):
    _, rows = train("run", precision)
    assert rows[-1]["validation/accuracy"] > 0.85
    assert all(math.isfinite(row["train/loss"]) for row in rows)


@pytest.mark.parametrize("precision", HALVES)
def test_gradient_is_that_of_autograd_in_full_precision(data_dir, precision):
    images, labels = digits(data_dir)
    model = MLP((512, 256, 128, 64)).initialise(0)
    config = TrainConfig(precision=precision)
    ours = Learner(MLP((512, 256, 128, 64)).initialise(0), config, world(HALVES[precision]))
    inputs = normalise(images.to(DEVICE), ours.input_dtype)
    found = ours.gradient_of(inputs, labels.to(DEVICE)).cpu()
    functional.cross_entropy(model(normalise(images, torch.float32)), labels).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    scale = 1 if ours.loss_scale is None else ours.loss_scale.item()
    assert ((found / scale - expected).norm() / expected.norm()).item() < 0.05


def test_an_overflow_in_fp16_costs_a_step_and_halves_the_scale(data_dir):
    images, labels = digits(data_dir)
    ours = Learner(MLP((512, 256, 128, 64)).initialise(0), TrainConfig(), world(torch.float16))
    inputs, labels = normalise(images.to(DEVICE), torch.float16), labels.to(DEVICE)
    ours.step(inputs, labels, len(labels), 0.01)
    before, momentum, scale = (
        ours.parameters.clone(),
        ours.momentum.clone(),
        ours.loss_scale.clone(),
    )
    ours.loss_scale.fill_(2.0**40)
    ours.step(inputs, labels, len(labels), 0.01)
    assert torch.equal(ours.parameters, before) and torch.equal(ours.momentum, momentum)
    assert ours.loss_scale.item() == 2.0**39
    ours.loss_scale.copy_(scale)
    ours.step(inputs, labels, len(labels), 0.01)
    assert not torch.equal(ours.parameters, before) and ours.parameters.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", *HALVES])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(train, precision, optimizer):
    settings = {"optimizer": optimizer, "learning_rate": 0.003, "rotation": 10.0, "elastic": 1.0}
    expected, rows = train("alone", precision, **settings)
    for step in (20, 70):  # not at a checkpoint
        with pytest.raises(SystemExit) as stopped:
            train("again", precision, StopAt(step), **settings)
        assert stopped.value.code == 75
    found, again = train("again", precision, **settings)
    assert torch.equal(found, expected)
    times = ("seconds", "images_per_second")
    for ours, theirs in zip(rows, again, strict=True):
        assert {k: v for k, v in ours.items() if k not in times} == {
            k: v for k, v in theirs.items() if k not in times
        }


@pytest.mark.parametrize("precision", ["fp32", *HALVES])
def test_probabilities_are_those_of_a_cpu(data_dir, precision):
    images, _ = digits(data_dir, 1000)
    model = MLP((512, 256, 128, 64)).initialise(0)
    expected = np.exp(predict(model, images.numpy(), World()))
    here = world(HALVES.get(precision, torch.float32))
    there = MLP((512, 256, 128, 64)).initialise(0).to(DEVICE, here.precision)
    with torch.no_grad():
        found = np.exp(predict(there, images.numpy(), here))
    assert np.abs(found - expected).max() < 1e-3


def test_distortions_are_those_of_a_cpu(data_dir):
    images, _ = digits(data_dir)
    config = TrainConfig(rotation=12, scaling=0.15, shear=0.1, shift=2, elastic=1.2, thickness=0.7)
    inputs, rows = normalise(images, torch.float32), slice(0, len(images))
    expected = Distortion(config, torch.device("cpu"))(inputs, 3, len(images), rows)
    found = Distortion(config, DEVICE)(inputs.to(DEVICE), 3, len(images), rows)
    assert (found.cpu() - expected).abs().max() < 1e-3
    assert (expected - inputs).abs().mean() > 0.05
