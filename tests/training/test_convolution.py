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
from mnist.training.convolution import Kernels, convolutions
from mnist.training.loop import Plan, set_free
from mnist.training.step import Learner

WIDTHS = (3 * 144, 5 * 16, 24, 16)


@pytest.fixture
def kernels():
    return Kernels(WIDTHS).initialise(0)


def mlp_of(kernels):
    model = MLP(kernels.hidden_sizes)
    model.load_state_dict(kernels.freed(kernels.state_dict()))
    return model


class Rows(nn.Module):
    """Maps in the order of ours: rows, columns, maps."""

    def forward(self, maps):
        return maps.permute(0, 2, 3, 1).flatten(1)


def twin(kernels):
    """The same network as torch has it: two convolutions and three linear layers."""
    first, second = kernels.convolutions
    layers = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, first.features, 5, 2), nn.ReLU(),
        nn.Conv2d(first.features, second.features, 5, 2), nn.ReLU(), Rows(),
        *(part for sizes in itertools.pairwise((*WIDTHS[1:], 10))
          for part in (nn.Linear(*sizes), nn.ReLU())),
    )[:-1]  # fmt: skip
    theirs = [layer for layer in layers if hasattr(layer, "weight")]
    with torch.no_grad():
        for layer, other in zip(kernels.layers, theirs, strict=True):
            other.weight.copy_(as_torch_has_it(layer.weight, other.weight))
            other.bias.copy_(layer.bias)
    return layers, theirs


def as_torch_has_it(ours, theirs):
    """Kernels in the order of maps, rows, columns."""
    if theirs.dim() == 2:
        return ours
    return ours.view(len(theirs), 5, 5, -1).permute(0, 3, 1, 2)


def optimizer_of(layers, name):
    if name == "sgd":
        return torch.optim.SGD(layers.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(layers.parameters(), 0.001, weight_decay=0.01)


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 784, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def test_an_mlp_computes_what_kernels_stand_for(kernels):
    layers, _ = twin(kernels)
    images, _ = batch(9, 0)
    model = mlp_of(kernels)
    assert [tuple(layer.weight.shape) for layer in model.layers[:2]] == [(432, 784), (80, 432)]
    torch.testing.assert_close(model(images), layers(images))
    bounds = [layer.weight.abs().max().item() for layer in model.layers[:2]]
    assert bounds == pytest.approx([25**-0.5, 75**-0.5], rel=0.05)
    assert (model.layers[0].weight != 0).float().mean() == pytest.approx(25 / 784)
    back = kernels.tied(model.state_dict())
    for name, tensor in kernels.state_dict().items():
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_torchs_convolutions(kernels, optimizer):
    layers, theirs = twin(kernels)
    config = TrainConfig(optimizer=optimizer, tied=0.5, hidden_sizes=WIDTHS, weight_decay=0.01)
    ours, expected = Learner(kernels, config, World()), optimizer_of(layers, optimizer)
    for step in range(10):
        images, labels = batch(16, step)
        ours.step(images, labels, 16, expected.param_groups[0]["lr"])
        expected.zero_grad()
        functional.cross_entropy(layers(images), labels).backward()
        expected.step()
    for layer, other in zip(kernels.layers, theirs, strict=True):
        found = as_torch_has_it(layer.weight, other.weight)
        torch.testing.assert_close(found, other.weight.data, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.bias.data, other.bias.data, rtol=1e-3, atol=1e-5)
    images, _ = batch(9, 99)
    torch.testing.assert_close(ours.logits(images), layers(images), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.mlp()(images), layers(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        (torch.float64, "torch"),
        (torch.float32, "torch"),
        (torch.float32, "onednn"),
        (torch.bfloat16, "torch"),
        (torch.bfloat16, "onednn"),
    ],
)
def test_a_gradient_is_the_sum_over_all_places_of_the_mlps(kernels, precision, kind):
    wide = torch.promote_types(precision, torch.float32)
    config = TrainConfig(tied=0.5, hidden_sizes=WIDTHS, batch_size=512)
    world = World(precision=precision)
    tied, free = (
        Learner(model.to(wide), config, world, kind) for model in (kernels, mlp_of(kernels))
    )
    images, labels = batch(33, 0)
    sums, expected = (
        learner._views(learner.gradient_of(images.to(learner.input_dtype), labels))
        for learner in (tied, free)
    )
    tolerance = 0.03 if precision == torch.bfloat16 else 1e-5
    for ours, theirs, found in zip(sums, expected, kernels.convolutions, strict=False):
        places = found._places_in(theirs.weight).sum((0, 1)).flatten(1)
        offsets = theirs.bias.view(-1, found.features).sum(0)
        for one, other in ((ours.weight, places), (ours.bias, offsets)):
            close = {"rtol": 0, "atol": tolerance * other.abs().max().item()}
            torch.testing.assert_close(one, other, **close)
    nothing = tied.gradient_of(images[:0].to(tied.input_dtype), labels[:0])
    assert not nothing.any()  # of a rank without images


def test_layers_are_set_free_from_the_average_with_an_optimizer_that_starts_over(kernels):
    settings = {"optimizer": "adamw", "averaging": 0.9, "hidden_sizes": WIDTHS}
    learner = Learner(kernels, TrainConfig(tied=0.5, **settings), World())
    for step in range(3):
        learner.step(*batch(16, step), 16, 0.01, averaging=0.1)
    images, _ = batch(9, 99)
    expected = learner.logits(images)
    freed = set_free(learner)
    torch.testing.assert_close(freed.logits(images), expected)
    assert torch.equal(freed.parameters, freed.average)
    assert not any(state.any() for state in (freed.momentum, freed.squares, freed.updates))
    assert torch.equal(freed.totals, learner.totals) and freed.totals[0] > 0
    free = copy.deepcopy(freed.model)
    optimizer = torch.optim.AdamW(free.parameters(), 0.001, weight_decay=0)
    for step in range(3):
        images, labels = batch(16, 50 + step)
        freed.step(images, labels, 16, 0.001)
        optimizer.zero_grad()
        functional.cross_entropy(free(images), labels).backward()
        optimizer.step()
    changed = freed.parameters[: 432 * 784].view(432, 784)
    torch.testing.assert_close(changed, free.layers[0].weight.data, rtol=1e-3, atol=1e-5)
    assert changed.count_nonzero() > 0.8 * changed.numel()


def test_when_layers_are_set_free():
    plan = Plan(1000, TrainConfig(tied=0.5, epochs=2, batch_size=100, hidden_sizes=WIDTHS))
    assert [plan.is_tied(step) for step in (1, 10, 11, 20)] == [True, True, False, False]
    assert [step for step in range(1, 21) if plan.sets_free(step)] == [11]
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
