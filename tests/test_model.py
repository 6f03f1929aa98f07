"""The network and its file."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mnist.cli import InputError
from mnist.model import MLP, Doubt, load_model, save_model

WIDTHS = (20, 16, 12, 14)


def test_five_linear_layers_as_numpy_computes_them():
    model = MLP(WIDTHS).initialise(seed=1)
    images = torch.randn(7, 28, 28, generator=torch.Generator().manual_seed(0))
    hidden = images.numpy().reshape(7, 784).astype(np.float64)
    weights = [parameter.detach().numpy().astype(np.float64) for parameter in model.parameters()]
    assert [w.shape for w in weights[::2]] == [(20, 784), (16, 20), (12, 16), (14, 12), (10, 14)]
    for index in range(5):
        hidden = hidden @ weights[2 * index].T + weights[2 * index + 1]
        if index < 4:
            hidden = np.maximum(hidden, 0)
    np.testing.assert_allclose(model(images).detach().numpy(), hidden, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(model(images).numpy(), hidden, atol=1e-5)


def test_initial_weights_depend_on_the_seed_alone():
    one = MLP(WIDTHS).initialise(seed=1).state_dict()
    torch.manual_seed(99)
    torch.rand(5)
    again, other = MLP(WIDTHS).initialise(seed=1).state_dict(), MLP(WIDTHS).initialise(seed=2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["layers.0.weight"], other.layers[0].weight)
    bound = 784**-0.5  # of nn.Linear: uniform, so its largest weight comes close
    assert 0.99 * bound < one["layers.0.weight"].abs().max() <= bound


@pytest.mark.parametrize("count", [3, 5])
def test_exactly_four_hidden_widths(count):
    with pytest.raises(InputError, match="four hidden widths"):
        MLP([8] * count)


def test_saved_model_comes_back_whole(tmp_path):
    model = MLP(WIDTHS).initialise(seed=1)
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert again.hidden_sizes == WIDTHS
    images = torch.randn(3, 784)
    assert torch.equal(model(images), again(images))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_metadata_is_enough_for_others(tmp_path):
    from safetensors import safe_open

    save_model(MLP(WIDTHS).initialise(seed=1), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        metadata = json.loads(file.metadata()["mnist-mlp-1"])
    assert metadata["hidden_sizes"] == [20, 16, 12, 14]
    assert (metadata["mean"], metadata["std"]) == (0.1307, 0.3081)


def test_same_weights_same_bytes(tmp_path):
    files = [tmp_path / str(index) for index in range(8)]
    for file in files:
        save_model(MLP(WIDTHS).initialise(seed=1), file)
    assert len({file.read_bytes() for file in files}) == 1


def test_other_files_are_one_clear_error(tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_model(MLP(WIDTHS).initialise(seed=1), good)
    contents = good.read_bytes()
    tensors = load_file(good)
    with pytest.raises(InputError, match=r"nothing.*[Nn]o such file"):
        load_model(tmp_path / "nothing")
    for damage in (
        contents[:-9],
        contents[: len(contents) // 2],
        b"",
        b"PK\x03\x04" + contents[4:],
    ):
        bad.write_bytes(damage)
        with pytest.raises(InputError, match=r"bad\.safetensors: not a usable model file"):
            load_model(bad)
    save_file(tensors, bad)
    with pytest.raises(InputError, match="not a model of this package"):
        load_model(bad)
    for change, expected in (
        ({"hidden_sizes": [20, 16, 12]}, "four hidden widths"),
        ({"std": 0.5}, "normalisation"),
        ({"hidden_sizes": [20, 16, 12, 15]}, "not a usable model file"),
        ({"hidden_sizes": None}, "not a usable model file"),
    ):
        metadata = {"hidden_sizes": WIDTHS, "mean": 0.1307, "std": 0.3081} | change
        save_file(tensors, bad, {"mnist-mlp-1": json.dumps(metadata)})
        with pytest.raises(InputError, match=expected):
            load_model(bad)


def test_doubt_is_stored_and_impossible_doubt_refused(tmp_path):
    model = MLP((8, 8, 8, 8)).initialise(0)
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    assert load_model(path).doubt is None
    without = path.read_bytes()
    model.doubt = Doubt(0.75, 0.625)
    save_model(model, path)
    assert load_model(path).doubt == (0.75, 0.625)
    written = path.read_bytes()
    assert b"threshold" in written and b"threshold" not in without
    for said, instead in ((b"0.625", b"1.625"), (b"0.75", b"0.00"), (b"0.75", b"NaN ")):
        path.write_bytes(written.replace(said, instead))
        with pytest.raises(InputError, match="not a usable model file: Doubt"):
            load_model(path)
    path.write_bytes(written.replace(b"temperature", b"temperament"))
    with pytest.raises(InputError, match="not a usable model file"):
        load_model(path)
