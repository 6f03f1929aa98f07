"""Tied layers against torch's convolutions, which know nothing of their matrices."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from mnist.cli import InputError
from mnist.distributed import World
from mnist.model import MLP
from mnist.training.config import TrainConfig
from mnist.training.convolution import begin_as_convolutions, convolutions
from mnist.training.loop import Plan
from mnist.training.step import Learner

WIDTHS = (3 * 144, 5 * 16, 24, 16)


@pytest.fixture
def model():
    made = MLP(WIDTHS).initialise(0)
    begin_as_convolutions(made, 0)
    return made


class Rows(nn.Module):
    """Maps in the order of ours: rows, columns, maps."""

    def forward(self, maps):
        return maps.permute(0, 2, 3, 1).flatten(1)


def twin(model):
    """The same network of two convolutions and three linear layers."""
    first, second = convolutions(model.hidden_sizes)
    layers = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, first.features, 5, 2), nn.ReLU(),
        nn.Conv2d(first.features, second.features, 5, 2), nn.ReLU(), Rows(),
        *(part for sizes in itertools.pairwise((*WIDTHS[1:], 10))
          for part in (nn.Linear(*sizes), nn.ReLU())),
    )[:-1]  # fmt: skip
    linear = [layer for layer in layers if hasattr(layer, "weight")]
    with torch.no_grad():
        for ours, theirs, found in zip(model.layers, linear[:2], (first, second), strict=False):
            theirs.weight.copy_(found.kernels(ours.weight)[0, 0])
            theirs.bias.copy_(ours.bias.view(-1, found.features)[0])
        for ours, theirs in zip(list(model.layers)[2:], linear[2:], strict=True):
            theirs.load_state_dict(ours.state_dict())
    return layers, linear


def optimizer_of(layers, name):
    if name == "sgd":
        return torch.optim.SGD(layers.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(layers.parameters(), 0.001, weight_decay=0.01)


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 784, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def test_a_tied_layer_is_a_convolution(model):
    layers, linear = twin(model)
    images, _ = batch(9, 0)
    torch.testing.assert_close(model(images), layers(images))
    bounds = [layer.weight.abs().max().item() for layer in linear[:2]]
    assert bounds == pytest.approx([25**-0.5, 75**-0.5], rel=0.05)
    assert (model.layers[0].weight != 0).float().mean() == pytest.approx(25 / 784)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_a_convolution(model, optimizer):
    layers, linear = twin(model)
    config = TrainConfig(
        optimizer=optimizer, tied=0.5, hidden_sizes=WIDTHS, weight_decay=0.01, products="torch"
    )
    ours = Learner(model, config, World())
    theirs = optimizer_of(layers, optimizer)
    for step in range(10):
        images, labels = batch(16, step)
        rate = theirs.param_groups[0]["lr"]
        ours.step(images, labels, 16, rate, tied=True, forget=step == 9)
        theirs.zero_grad()
        functional.cross_entropy(layers(images), labels).backward()
        theirs.step()
    for layer, convolution, found in zip(
        ours.model.layers, linear, convolutions(WIDTHS), strict=False
    ):
        kernels = found.kernels(layer.weight)
        expected = convolution.weight.expand_as(kernels)
        torch.testing.assert_close(kernels, expected, rtol=1e-3, atol=1e-5)
        assert layer.weight.count_nonzero() <= kernels.numel()
    images, _ = batch(9, 99)
    torch.testing.assert_close(ours.logits(images), layers(images), rtol=1e-3, atol=1e-4)

    free = copy.deepcopy(ours.model)  # set free, like linear layers that were never tied
    afresh = optimizer_of(free, optimizer)
    for step in range(3):
        images, labels = batch(16, 50 + step)
        ours.step(images, labels, 16, afresh.param_groups[0]["lr"])
        afresh.zero_grad()
        functional.cross_entropy(free(images), labels).backward()
        afresh.step()
    images, _ = batch(9, 98)
    torch.testing.assert_close(ours.logits(images), free(images), rtol=1e-3, atol=1e-4)
    assert ours.model.layers[0].weight.count_nonzero() > 0.8 * ours.model.layers[0].weight.numel()


def test_what_is_set_free_starts_from_the_average(model):
    settings = {"optimizer": "adamw", "averaging": 0.9, "hidden_sizes": WIDTHS}
    learner = Learner(model, TrainConfig(tied=0.5, **settings), World())
    for step in range(3):
        learner.step(*batch(16, step), 16, 0.01, averaging=0.1, tied=True)
    assert not torch.equal(learner.parameters, learner.average)
    learner.step(*batch(16, 3), 16, 0.01, averaging=0.1, tied=True, forget=True)
    assert torch.equal(learner.parameters, learner.average)
    assert not any(state.any() for state in (learner.momentum, learner.squares, learner.updates))
    kernels = learner._convolutions[0].kernels(learner.model.layers[0].weight)
    assert torch.equal(kernels, kernels[:1, :1].expand_as(kernels))


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tied_gradient_is_the_sum_of_the_free_one(model, precision):
    wide = torch.promote_types(precision, torch.float32)
    config = TrainConfig(tied=0.5, hidden_sizes=WIDTHS, batch_size=512, products="torch")
    learner = Learner(model.to(wide), config, World(precision=precision))
    images, labels = batch(33, 0)
    images = images.to(learner.input_dtype)
    free, tied = (learner.gradient_of(images, labels, way) for way in (False, True))
    for found, expected, convolution in zip(
        learner._views(tied), learner._views(free), learner._convolutions, strict=False
    ):
        sums = convolution.kernels(expected.weight).sum((0, 1))
        kernels = convolution.kernels(found.weight)
        tolerance = 0.03 if precision == torch.bfloat16 else 1e-5
        close = {"rtol": 0, "atol": tolerance * sums.abs().max().item()}
        torch.testing.assert_close(kernels, sums.expand_as(kernels), **close)
        assert found.weight.count_nonzero() == kernels.count_nonzero()
        sums = expected.bias.view(-1, convolution.features).sum(0)
        close = {"rtol": 0, "atol": tolerance * sums.abs().max().item()}
        torch.testing.assert_close(found.bias.view(-1, convolution.features)[7], sums, **close)
    nothing = learner.gradient_of(images[:0], labels[:0], tied=True)  # of a rank without images
    assert not nothing.any()


def test_when_layers_are_set_free():
    plan = Plan(1000, TrainConfig(tied=0.5, epochs=2, batch_size=100, hidden_sizes=WIDTHS))
    assert [plan.is_tied(step) for step in (1, 10, 11, 20)] == [True, True, False, False]
    assert [step for step in range(1, 21) if plan.sets_free(step)] == [10]
    plain = Plan(1000, TrainConfig(epochs=1))
    assert not any(plain.is_tied(step) or plain.sets_free(step) for step in (1, plain.steps))
    always = Plan(1000, TrainConfig(tied=1.0, epochs=1, hidden_sizes=WIDTHS))
    assert always.is_tied(always.steps) and not always.sets_free(always.steps)


def test_the_schedule_starts_over():
    def rates(**settings):
        plan = Plan(1000, TrainConfig(batch_size=100, hidden_sizes=WIDTHS, **settings))
        return [plan.learning_rate(step) for step in range(1, plan.steps + 1)]

    cosine = {"schedule": "cosine", "warmup": 0.2, "learning_rate": 0.5}
    both = rates(epochs=3, tied=2 / 3, **cosine)
    assert both[:20] == pytest.approx(rates(epochs=2, **cosine))
    assert both[20:] == pytest.approx([rate * 0.02 for rate in rates(epochs=1, **cosine)])
    assert rates(epochs=1, tied=1.0, **cosine) == rates(epochs=1, **cosine)


def test_widths_that_are_no_maps_are_refused():
    assert [one[:3] for one in convolutions((288, 48, 20, 20))] == [(1, 28, 2), (2, 12, 3)]
    for widths in ((512, 256, 128, 64), (288, 50, 20, 20), (143, 16, 20, 20)):
        with pytest.raises(InputError, match="--tied takes --hidden-sizes"):
            TrainConfig(tied=0.5, hidden_sizes=widths)
