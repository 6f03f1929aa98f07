"""Recipes, YAML files and the command line."""

import dataclasses
import subprocess
import sys

import pytest
import yaml

from mnist.config import (
    InputError,
    TrainConfig,
    derived_seed,
    numeric_settings,
    parse_train_config,
    to_yaml,
)


def test_baseline_is_the_original_method():
    config = parse_train_config([])
    assert config.hidden_sizes == (512, 256, 128, 64)
    assert (config.optimizer, config.learning_rate, config.momentum) == ("sgd", 0.01, 0.9)
    assert (config.schedule, config.batch_size, config.weight_decay) == ("constant", 64, 0.0)
    assert not config.nesterov and config.label_smoothing == 0.0


def test_option_over_file_over_recipe(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "recipe: fast\nepochs: 7\nseed: 3\nnesterov: false\nhidden_sizes: [4, 3, 2, 1]\n"
    )
    config = parse_train_config(["--config", str(file), "--seed", "5"])
    assert config.recipe == "fast"
    assert config.batch_size == parse_train_config(["--recipe", "fast"]).batch_size != 64
    assert (config.epochs, config.seed, config.hidden_sizes) == (7, 5, (4, 3, 2, 1))


def test_underscores_and_hyphens_both_work():
    assert parse_train_config(["--batch_size", "8"]) == parse_train_config(["--batch-size=8"])


def test_saved_settings_repeat_the_run(tmp_path):
    config = parse_train_config("--recipe fast --seed 4 --momentum 0.8".split())
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_yaml(config)))
    again = parse_train_config(["--config", str(file)])
    assert dataclasses.replace(again, config=None) == config
    assert again.run_folder == config.run_folder
    here = parse_train_config("--recipe fast --seed 4 --momentum 0.8 --threads 32".split())
    assert to_yaml(here) == to_yaml(config)  # threads are of a machine


def test_run_name_follows_the_settings_that_change_the_numbers():
    folder = TrainConfig().run_folder
    assert folder.name == "baseline-seed0-44136f"  # in later versions too
    assert TrainConfig(threads=3, log_every=7, evaluate="none").run_folder == folder
    for change in (
        {"epochs": 3},
        {"precision": "fp32"},
        {"validation_size": 0},
        {"nesterov": True},
    ):
        assert TrainConfig(**change).run_folder != folder
    assert TrainConfig(run_name="mine").run_folder.name == "mine"


def test_every_setting_is_either_numeric_or_known_not_to_be():
    # A new setting must be put on one side: else a resumed run could silently change its numbers.
    others = set(
        "recipe config run_name runs_dir data_dir threads threads_in_file log_every checkpoint_every "
        "keep_checkpoints fresh evaluate expect_world_size "
        "wandb wandb_project wandb_entity wandb_group wandb_tags".split()
    )
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == others | numeric_settings(TrainConfig()).keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--batch-siz 3", "--batch-siz"),
        ("stray", "stray"),
        ("--batch-size 0", "--batch-size takes 1 to 60000, not 0"),
        ("--batch-size 1000000000000000000000", "--batch-size takes 1 to 60000"),
        ("--warmup 0.5", "--warmup takes --schedule triangular or cosine"),
        ("--batch-size many", "--batch-size takes a whole number, not 'many'"),
        ("--learning-rate high", "--learning-rate takes a number, not 'high'"),
        ("--learning-rate nan", "--learning-rate takes more than 0"),
        ("--learning-rate", "--learning-rate"),
        ("--hidden-sizes 5 4 3 2 1", "--hidden-sizes takes exactly four widths"),
        ("--hidden-sizes 5 4 3", "--hidden-sizes takes exactly four widths"),
        ("--hidden-sizes 5 4 0 3", "--hidden-sizes takes exactly four widths"),
        ("--precision fp8", "--precision"),
        ("--averaging 1", "--averaging takes 0 to below 1"),
        ("--rotation 200", "--rotation takes 0 to 180"),
        ("--scaling 1", "--scaling takes 0 to below 1"),
        ("--shear nan", "--shear takes 0 or more"),
        ("--shift -1", "--shift takes 0 or more"),
        ("--elastic inf", "--elastic takes 0 or more"),
        ("--thickness 1.1", "--thickness takes 0 to 1"),
        ("--gaps -0.1", "--gaps takes 0 to 1"),
        ("--elastic-smoothness 0", "--elastic-smoothness takes 0.5 to 28"),
        ("--recipe quick", "--recipe takes one of baseline, fast, record, not quick"),
        ("--momentum 1", "--momentum takes 0 to below 1"),
        ("--validation-size 60000", "--validation-size takes 0 to 59000"),
        ("--run-name a/b", "--run-name takes a plain folder name"),
        ("--run-name ..", "--run-name takes a plain folder name"),
        ("--nesterov --momentum 0", "--nesterov takes"),
        ("--config nowhere.yaml", "--config nowhere.yaml: No such file"),
    ],
)
def test_bad_options_are_one_line_that_names_them(arguments, expected):
    with pytest.raises(InputError) as caught:
        parse_train_config(arguments.split())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_sizes: 3", "unknown setting batch_sizes"),
        ("batch_size: many", "--batch-size takes a whole number"),
        ("batch_size: [3, 4]", "4"),
        ("hidden_sizes: [3, 4]", "--hidden-sizes takes exactly four widths"),
        ("- 1", "expected lines of"),
        ("a: [", "not a YAML file"),
        ("recipe: slow", "--recipe takes one of"),
        ("recipe: [fast]", "--recipe takes one of"),
        ("seed: 2024-13-45", "not a YAML file"),
        ("data_dir: null", "--data-dir takes a value"),
    ],
)
def test_bad_files_are_one_line_that_names_them(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse_train_config(["--config", str(file)])
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert "bad.yaml" in str(caught.value)


def test_recipe_beside_a_file_of_another_recipe_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("recipe: baseline\n")
    with pytest.raises(InputError, match="leave one of the two out"):
        parse_train_config(["--recipe", "fast", "--config", str(file)])


def test_derived_seeds_are_fixed_and_apart():
    # By hand: sha256("0/order/1") begins with these 8 bytes, halved.
    assert derived_seed(0, "order", 1) == int("7c9b834547ac6879", 16) >> 1
    seeds = {
        derived_seed(s, p, e) for s in range(20) for p in ("order", "split") for e in range(20)
    }
    assert len(seeds) == 800


def test_options_are_parsed_without_torch():
    code = "import sys, mnist.config, mnist.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
