"""The hand-written step against autograd and torch.optim, which know nothing of it."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist.distributed import World
from mnist.model import MLP, NO_DIGIT
from mnist.training.config import TrainConfig
from mnist.training.step import Learner

WIDTHS = (40, 32, 24, 16)
LARGE = (256, 256, 24, 16)  # its first two layers are large enough for half precision


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 784, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def learner(model, precision=torch.float32, products="torch", **settings):
    config = TrainConfig(products=products, **settings)
    return Learner(copy.deepcopy(model), config, World(precision=precision))


def total_gradient(ours, images, labels, batch_size):
    inputs, deltas = ours._differentiate(images, labels, batch_size)
    ours._sum(inputs, deltas, range(5))
    return ours.gradient


def differentiate(ours, images, labels):
    total_gradient(ours, images, labels, batch_size=len(labels))


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("products", ["torch", "onednn"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_and_sums_are_those_of_autograd(smoothing, products):
    model = MLP(WIDTHS).initialise(0)
    images, labels = batch(50)
    ours = learner(model, products=products, label_smoothing=smoothing)
    differentiate(ours, images, labels)
    logits = model(images)
    loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(ours.gradient, expected, rtol=1e-4, atol=1e-7)
    plain = functional.cross_entropy(logits, labels, reduction="sum")
    loss_sum, correct = ours.take_totals().tolist()
    assert loss_sum == pytest.approx(plain.item(), rel=1e-5)
    assert correct == (logits.argmax(1) == labels).sum().item()


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({}, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
        ({"momentum": 0.0}, lambda p: torch.optim.SGD(p, 0.05)),
        (
            {"nesterov": True, "weight_decay": 1e-2},
            lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
        ),
        (
            {"optimizer": "adamw", "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, 0.05, betas=(0.9, 0.999), weight_decay=0.1),
        ),
    ],
)
def test_twenty_steps_end_where_torch_optim_ends(settings, optimizer):
    model = MLP(WIDTHS).initialise(0)
    ours = learner(model, **settings)
    theirs = optimizer(model.parameters())
    for step in range(20):
        images, labels = batch(16, seed=step)
        ours.step(images, labels, batch_size=16, learning_rate=0.05 * 0.9**step)
        theirs.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        theirs.param_groups[0]["lr"] = 0.05 * 0.9**step
        theirs.step()
    torch.testing.assert_close(ours.parameters, flat(model), rtol=1e-3, atol=1e-4)
    assert torch.equal(ours.parameters, flat(ours.model))  # the model shares their memory


@pytest.mark.parametrize(
    ("precision", "products"),
    [(torch.bfloat16, "torch"), (torch.bfloat16, "onednn"), (torch.float16, "torch")],
)
def test_half_precision_gradient_is_as_near_the_full_one_as_autocast(precision, products):
    model = MLP(LARGE).initialise(0)
    images, labels = batch(64)
    full, half = learner(model), learner(model, precision, products)
    for each in (full, half):
        differentiate(each, images, labels)
    scale = 1 if half.loss_scale is None else half.loss_scale
    copies = 0 if half.input_dtype == torch.float32 else 784 * 256 + 256 + 256 * 256 + 256
    assert half._half.numel() == copies
    with torch.autocast("cpu", precision):
        loss = functional.cross_entropy(model(images), labels)
    (loss * scale).backward()
    autocast = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def error(gradient):
        return ((gradient / scale - full.gradient).norm() / full.gradient.norm()).item()

    assert 0 < error(half.gradient) < 1.2 * error(autocast) < 0.2


@pytest.mark.parametrize(
    ("batch_size", "large_layers"), [(64, 2), (256, 2), (512, 3), (4096, 4), (60_000, 4)]
)
def test_more_layers_are_in_half_precision_where_images_are_many_but_never_the_logits(
    batch_size, large_layers
):
    model = MLP((512, 256, 128, 64))
    for size in (1, 3):  # whatever the number of processes
        config = TrainConfig(batch_size=batch_size)
        world = World(size=size, precision=torch.bfloat16)
        ours = Learner(copy.deepcopy(model), config, world, "torch")
        expected = sum(
            p.numel() for layer in model.layers[:large_layers] for p in layer.parameters()
        )
        assert len(ours._half) == expected


def test_half_precision_learns_through_full_precision_weights():
    # Updates below the resolution of bf16 must add up, not be lost.
    half = learner(MLP(LARGE).initialise(0), torch.bfloat16)
    before, rounded_before = half.parameters.clone(), half._half.clone()
    half.step(*batch(64), batch_size=64, learning_rate=1e-3)
    assert (half._half == rounded_before).float().mean() > 0.9
    assert (half.parameters != before).float().mean() > 0.9
    assert torch.equal(half._half, half.parameters[: half._half.numel()].bfloat16())


def test_what_is_no_digit_has_a_uniform_target_and_no_part_in_the_totals():
    model = MLP(WIDTHS).initialise(0)
    images, labels = batch(50)
    labels[::3] = NO_DIGIT
    ours = learner(model, label_smoothing=0.1, non_digits=0.4)
    differentiate(ours, images, labels)
    logits, digits = model(images), labels != NO_DIGIT
    targets = torch.full((50, 10), 0.1)
    targets[digits] = 0.9 * functional.one_hot(labels[digits], 10) + 0.01
    functional.cross_entropy(logits, targets).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(ours.gradient, expected, rtol=1e-4, atol=1e-7)
    loss_sum, correct, number = ours.take_totals().tolist()
    plain = functional.cross_entropy(logits[digits], labels[digits], reduction="sum")
    assert loss_sum == pytest.approx(plain.item(), rel=1e-5)
    assert correct == (logits.argmax(1) == labels).sum().item() and number == digits.sum().item()


def test_slices_add_up_to_the_global_batch():
    model = MLP(WIDTHS).initialise(0)
    images, labels = batch(13)
    whole, part = learner(model), learner(model)
    expected = total_gradient(whole, images, labels, batch_size=13)
    total = torch.zeros_like(expected)
    for piece in (slice(0, 7), slice(7, 7), slice(7, 13)):  # uneven, one of them empty
        total += total_gradient(part, images[piece], labels[piece], batch_size=13)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_empty_slice_contributes_zeros(precision):
    ours = learner(MLP(LARGE).initialise(0), precision)
    ours.gradient.fill_(7)
    assert not total_gradient(ours, *batch(0), batch_size=3).any()


@pytest.mark.parametrize("waiting", [5, 2**14])  # images, until steps are scored
def test_a_gradient_that_is_looked_at_has_no_consequences(monkeypatch, waiting):
    monkeypatch.setattr("mnist.training.step._UNSCORED_IMAGES", waiting)
    ours, other = (learner(MLP(WIDTHS).initialise(0)) for _ in range(2))
    for step in range(4):
        ours.step(*batch(16, step), batch_size=16, learning_rate=0.1)
        looked_at = ours.gradient_of(*batch(16, 9))
        other.step(*batch(16, step), batch_size=16, learning_rate=0.1)
    assert torch.equal(ours.parameters, other.parameters)
    assert torch.equal(ours.take_totals(), other.take_totals())
    assert looked_at.any() and torch.equal(looked_at, other.gradient_of(*batch(16, 9)))


def test_totals_are_sums_since_they_were_last_taken():
    model = MLP(WIDTHS).initialise(0)
    ours = learner(model)
    images, labels = batch(16)
    for _ in range(3):
        ours.step(images, labels, batch_size=16, learning_rate=1e-9)
    loss = functional.cross_entropy(model(images), labels, reduction="sum")
    assert ours.take_totals()[0].item() == pytest.approx(3 * loss.item(), rel=1e-5)
    assert not ours.take_totals().any()


def test_totals_are_exact_however_often_they_are_summed_up():
    # Losses from 1e-7 to 1e3: in float64 as they are, the order of summation would show.
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(40):
        scale = 10 ** (6 * torch.rand(33, 1, generator=generator) - 3)
        logits = scale * torch.randn(33, 10, generator=generator)
        parts.append((logits, torch.randint(0, 10, (33,), generator=generator)))
    totals = []
    for cuts in ((), (3, 4, 17), range(40)):
        ours = learner(MLP(WIDTHS).initialise(0))
        for step, part in enumerate(parts):
            ours._unscored.append(part)
            if step in cuts:
                ours.sum_up()
        totals.append(ours.take_totals())
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])
    losses = [functional.cross_entropy(*part, reduction="sum").item() for part in parts]
    assert totals[0][0].item() == pytest.approx(sum(losses), rel=1e-5)


def test_few_logits_wait_to_be_scored(monkeypatch):
    monkeypatch.setattr("mnist.training.step._UNSCORED_IMAGES", 64)
    ours = learner(MLP(WIDTHS).initialise(0))
    for step in range(20):
        ours.step(*batch(16, seed=step), batch_size=16, learning_rate=0.05)
        assert len(ours._unscored) <= 4
    assert ours.take_totals()[0] > 20 * 16  # nats


def test_a_loss_that_is_not_finite_shows_in_the_totals():
    ours = learner(MLP(WIDTHS).initialise(0))
    images, labels = batch(16)
    images[3] = torch.inf
    ours.step(images, labels, batch_size=16, learning_rate=0.05)
    assert not ours.take_totals()[0].isfinite()


def test_average_of_weights_is_that_of_torch_and_what_the_model_has():
    model = MLP(WIDTHS).initialise(0)
    ours = learner(model, averaging=0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(20):
        images, labels = batch(16, seed=step)
        ours.step(images, labels, batch_size=16, learning_rate=0.05, averaging=1 - 0.9)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        theirs.update_parameters(model)
    torch.testing.assert_close(ours.parameters, flat(model), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(flat(ours.model), flat(theirs.module), rtol=1e-3, atol=1e-4)
    assert (flat(ours.model) - ours.parameters).abs().max() > 1e-3
    images, _ = batch(50)
    torch.testing.assert_close(ours.logits(images), ours.model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_learner_goes_on_from_a_copy_of_its_state(precision):
    settings = {"averaging": 0.9, "nesterov": True}
    ours, theirs = (learner(MLP(LARGE).initialise(seed), precision, **settings) for seed in (0, 1))
    for step in range(20):
        if step == 10:
            ours.sum_up()
            theirs.load(ours.weights(), ours.state())
        for each in (ours, theirs):
            each.step(
                *batch(33, seed=step), batch_size=33, learning_rate=0.05, averaging=10 / (10 + step)
            )
    assert torch.equal(ours.parameters, theirs.parameters)
    assert torch.equal(flat(ours.model), flat(theirs.model))
    assert torch.equal(ours.take_totals(), theirs.take_totals())


def test_fp16_overflow_leaves_weights_and_momentum_and_halves_the_scale():
    ours = learner(MLP(LARGE).initialise(0), torch.float16)
    ours.step(*batch(64), batch_size=64, learning_rate=0.1)
    weights, momentum, scale = (
        ours.parameters.clone(),
        ours.momentum.clone(),
        ours.loss_scale.clone(),
    )
    images, labels = batch(64, seed=1)
    ours.loss_scale.fill_(2.0**40)
    ours.step(images, labels, batch_size=64, learning_rate=0.1)
    assert torch.equal(ours.parameters, weights) and torch.equal(ours.momentum, momentum)
    assert ours.loss_scale.item() == 2.0**39
    ours.loss_scale.copy_(scale)
    ours.step(images, labels, batch_size=64, learning_rate=0.1)
    assert not torch.equal(ours.parameters, weights)


def test_fp16_scale_doubles_after_a_long_time_without_overflow():
    ours = learner(MLP(WIDTHS).initialise(0), torch.float16)
    scale = ours.loss_scale.item()
    ours.steps_without_overflow.fill_(1999)
    ours.step(*batch(4), batch_size=4, learning_rate=1e-3)
    assert ours.loss_scale.item() == 2 * scale
    assert ours.steps_without_overflow.item() == 0


def test_same_batches_same_bytes():
    def run():
        ours = learner(MLP(LARGE).initialise(0), torch.bfloat16, nesterov=True)
        for step in range(10):
            ours.step(*batch(33, seed=step), batch_size=33, learning_rate=0.05)
        return ours.parameters

    assert torch.equal(run(), run())
