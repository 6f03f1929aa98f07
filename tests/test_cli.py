"""Recipes, YAML files and the command line."""

import contextlib
import dataclasses
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
import yaml

from mnist.cli import InputError, read_yaml
from mnist.data import derived_seed
from mnist.distributed import World
from mnist.evaluation.config import parse_evaluate_config
from mnist.training.config import (
    RECIPES,
    TrainConfig,
    numeric_settings,
    parse_train_config,
    to_yaml,
)
from mnist.training.job import open_run

JOB = str(Path(__file__).parents[1] / "jobs/train.py")


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


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--nesterov=True"], "nesterov", True),
        (["--nesterov", "true"], "nesterov", True),
        (["--nesterov=1", "--seed=3"], "nesterov", True),
        (["--nesterov", "--nesterov=False"], "nesterov", False),
        (["--nesterov", "--no_nesterov=True"], "nesterov", False),
        (["--nesterov", "--nesterov", "0"], "nesterov", False),
        (["--nesterov", "--no-nesterov"], "nesterov", False),
        (["--hidden_sizes=[512, 256, 128, 32]"], "hidden_sizes", (512, 256, 128, 32)),
        (["--hidden-sizes", "[512,256,128,32]"], "hidden_sizes", (512, 256, 128, 32)),
        (["--hidden_sizes=512,256,128,32"], "hidden_sizes", (512, 256, 128, 32)),
        (["--hidden-sizes", "512, 256, 128, 32"], "hidden_sizes", (512, 256, 128, 32)),
        (["--hidden-sizes=512", "256", "128", "32"], "hidden_sizes", (512, 256, 128, 32)),
        (["--wandb_tags=['a b', \"it's\"]"], "wandb_tags", ("a b", "it's")),
        (["--wandb-tags=[]"], "wandb_tags", ()),
        (["--wandb-tags", "a,b", "[c]"], "wandb_tags", ("a,b", "[c]")),
        (["--threads=None"], "threads", None),
        (["--threads", "null"], "threads", None),
        (["--run_name=null"], "run_name", None),
        (["--config=null"], "config", None),
        (["--learning_rate=1e-3"], "learning_rate", 0.001),
    ],
)
def test_words_of_an_agent(words, field, value):
    assert getattr(parse_train_config(words), field) == value


def test_words_of_an_agent_in_an_evaluation():
    config = parse_evaluate_config(["--run=r", "--split=null", "--threads", "None"])
    assert (config.split, config.threads) == (None, None)


def test_settings_that_are_no_more_are_read_at_their_only_value(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 4\nelastic_smoothness: 5.0\ngaps: 0\n")
    assert parse_train_config(["--config", str(file)]) == TrainConfig(seed=4, config=file)
    file.write_text("gaps: 0.3\n")
    with pytest.raises(InputError, match=r"config\.yaml: --gaps is no more: it is always 0\.0$"):
        parse_train_config(["--config", str(file)])

    # Nor does a run that had another go on without it.
    config = TrainConfig(runs_dir=tmp_path, run_name="run")
    (tmp_path / "run").mkdir()
    for gaps, refused in ((0.0, False), (0.3, True)):
        settings = to_yaml(config) | {"gaps": gaps, "elastic_smoothness": 5.0}
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
        with ExitStack() as stack:
            if refused:
                stack.enter_context(
                    pytest.raises(InputError, match=r"--gaps 0\.3 there, 0\.0 here")
                )
            open_run(config, World(), stack)


@pytest.mark.parametrize("exact", ["true", "false"])
def test_exact_sums_of_an_earlier_version_are_left_out_in_one_line(tmp_path, exact, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(f"seed: 4\nexact_sums: {exact}\n")
    assert parse_train_config(["--config", str(file)]) == TrainConfig(seed=4, config=file)
    assert capsys.readouterr().err == f"warning: {file}: --exact-sums is no more, and left out\n"


@pytest.mark.parametrize("added", [(), ("thickness", "sharpness", "other_hands", "non_digits")])
def test_file_of_a_run_of_record_as_it_was_repeats_that_run(tmp_path, added):
    """Its recipe has another network now, and a part of which such files say nothing."""
    config = TrainConfig(recipe="record", **RECIPES["plain"])
    assert not config.tied and RECIPES["record"]["tied"]
    settings = {k: v for k, v in to_yaml(config).items() if k not in ("tied", *added)}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    again = parse_train_config(["--config", str(file)])
    assert dataclasses.replace(again, config=None) == config

    file.write_text("recipe: record\nepochs: 3\n")
    assert parse_train_config(["--config", str(file)]).tied == RECIPES["record"]["tied"]


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
        "recipe config run_name runs_dir data_dir threads threads_in_file log_every "
        "checkpoint_every keep_checkpoints fresh evaluate expect_world_size products "
        "wandb wandb_project wandb_entity wandb_group wandb_tags".split()
    )
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == others | numeric_settings(TrainConfig()).keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--batch-siz 3", "--batch-siz"),
        ("--threads many", "--threads takes a whole number, not 'many'"),
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
        ("--tied 2", "--tied takes 0 to 1"),
        ("--tied 0.5", "--tied takes --hidden-sizes of which the first is a multiple of 144"),
        ("--rotation 200", "--rotation takes 0 to 180"),
        ("--scaling 1", "--scaling takes 0 to below 1"),
        ("--shear nan", "--shear takes 0 or more"),
        ("--shift -1", "--shift takes 0 or more"),
        ("--elastic inf", "--elastic takes 0 or more"),
        ("--thickness 1.1", "--thickness takes 0 to 1"),
        ("--thickness -0.1", "--thickness takes 0 to 1"),
        ("--sharpness 1.1", "--sharpness takes 0 to 1"),
        ("--other-hands -1", "--other-hands takes 0 to 10"),
        ("--non-digits 11", "--non-digits takes 0 to 10"),
        ("--nesterov=maybe", "--nesterov takes true or false, not maybe"),
        ("--nesterov 2", "--nesterov takes true or false, not 2"),
        ("--no-nesterov=on", "--no-nesterov takes true or false, not on"),
        ("--hidden-sizes=[4,3,2", "--hidden-sizes"),
        ("--hidden-sizes=[[4,3],[2,1]]", "--hidden-sizes"),
        ("--hidden-sizes=[4,3,2]", "--hidden-sizes takes exactly four widths"),
        ("--hidden-sizes=None", "--hidden-sizes"),
        ("--wandb-tags=['a','--fresh']", "--wandb-tags takes --fresh as the first"),
        ("--batch-size=True", "--batch-size takes a whole number, not 'True'"),
        ("--learning-rate=None", "--learning-rate takes a number, not 'None'"),
        (
            "--recipe quick",
            "--recipe takes one of baseline, fast, plain, record, reader, not quick",
        ),
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
        ("seed: 2024-13-45", "--seed takes a whole number, not '2024-13-45'"),
        ("data_dir: null", "--data-dir takes a value"),
        ("wandb_group: None", "--wandb-group takes null for nothing, not None"),
        ("nesterov: maybe", "--nesterov takes true or false, not maybe"),
        ("nesterov: 1", "--nesterov takes true or false, not 1"),
        ("seed: [3]", "--seed takes one value, not the list 3"),
        ("seed: {a: 1}", "--seed takes a plain value"),
        ("recipe: [[fast]]", "--recipe takes a plain value"),
        ("wandb_tags: [a, null]", "or a list of them without null"),
        ("wandb_group: !!binary aGk=", "--wandb-group takes a plain value"),
        ('data_dir: "a\\0b"', "--data-dir takes a plain value"),
        ('data_dir: "\\ud800"', "--data-dir takes a plain value"),
        ("wandb_tags: [a, --fresh]", "--wandb-tags takes --fresh as the first of its values only"),
        ("wandb_tags: [a, -h]", "--wandb-tags takes -h as the first of its values only"),
        ("wandb_tags: [a, --]", "--wandb-tags takes -- as the first of its values only"),
        ('? "a\\nb"\n: 3', r"unknown setting 'a\nb'"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
    ],
)
def test_bad_files_are_one_line_that_names_them(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


def from_file(folder, text, *arguments):
    file = folder / "bad.yaml"
    file.write_bytes(text.encode())
    return parse_train_config(["--config", str(file), *arguments])


def refusal(folder, text):
    """One line that names the file."""
    with pytest.raises(InputError) as caught:
        from_file(folder, text)
    assert "bad.yaml: " in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("seed: 3\nepochs: 2\nseed: 4", "1 and 3"),
        ("# seeds\n\nseed: 3\n\nseed: 3", "3 and 5"),
        ("seed: 3\n'seed': 4\nseed: 5", "1 and 2"),
        ("epochs: 2\n? seed\n: 3\n!!str seed: 4", "2 and 4"),
        ("{seed: 3, seed: 4}", "1 and 1"),
        ("seed: {\n  seed: 3,\n  seed: 4}", "2 and 3"),
        ("<<: {seed: 3,\n  seed: 4}\nseed: 5", "1 and 2"),
    ],
)
def test_setting_given_twice_is_refused_with_both_lines(tmp_path, text, lines):
    assert refusal(tmp_path, text).endswith(f"bad.yaml: seed is given twice, in lines {lines}")


def test_merged_settings_may_be_overridden(tmp_path):
    text = "<<: [{seed: 3, epochs: 2}, {log_every: 7, seed: 4}]\nepochs: 5\nbatch_size: 8\n"
    config = from_file(tmp_path, text)
    assert (config.seed, config.epochs, config.log_every, config.batch_size) == (3, 5, 7, 8)
    assert refusal(tmp_path, "<<: {seed: 3}\n<<: {epochs: 2}").endswith(
        "<< is given twice, in lines 1 and 2"
    )


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        # YAML 1.1 reads 8, 83, 1000, 90, a date, False, True, an infinity, None and 31.
        ("seed: 010", "seed", 10),
        ("wandb_group: 0123", "wandb_group", "0123"),
        ("run_name: 1_000", "run_name", "1_000"),
        ("wandb_group: 1:30", "wandb_group", "1:30"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),
        ("run_name: no", "run_name", "no"),
        ("wandb_group: on", "wandb_group", "on"),
        ("wandb_group: .inf", "wandb_group", ".inf"),
        ("wandb_group: 'null'", "wandb_group", "null"),
        ("wandb_tags: [0x1f]", "wandb_tags", ("0x1f",)),
        ("wandb_tags: [0123, no, 1e3, 'null', '', 'a: b', ü]", "wandb_tags", None),
        ("wandb_group: !!int 010", "wandb_group", "010"),
        ("wandb_group: '='", "wandb_group", "="),
        ("wandb_group: =", "wandb_group", "="),
        ("wandb_group: ''", "wandb_group", ""),
        ("wandb_group: --fresh", "wandb_group", "--fresh"),
        ("wandb_group: -h", "wandb_group", "-h"),
        ("wandb_tags: [--fresh, -1, '']", "wandb_tags", ("--fresh", "-1", "")),
        ("data_dir: a b/ü", "data_dir", Path("a b/ü")),
        ("learning_rate: 1e-05", "learning_rate", 0.00001),
        ("seed: &s 3\nepochs: *s", "epochs", 3),
        ("wandb_group:", "wandb_group", None),
        ("threads: null", "threads", None),
        ("nesterov: yes", "nesterov", True),
        ("nesterov: On", "nesterov", True),
        ("nesterov: 'true'", "nesterov", True),
    ],
)
def test_what_is_written_is_what_is_taken(tmp_path, text, field, value):
    if value is None and "tags" in text:
        value = ("0123", "no", "1e3", "null", "", "a: b", "ü")
    config = from_file(tmp_path, text)
    assert getattr(config, field) == value
    assert not config.fresh


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size: 1:30", "--batch-size takes a whole number, not '1:30'"),
        ("seed: 0x10", "--seed takes a whole number, not '0x10'"),
        ("epochs: 1e3", "--epochs takes a whole number, not '1e3'"),
        ("epochs: true", "--epochs takes a whole number, not 'true'"),
        ("learning_rate: .inf", "--learning-rate takes a number, not '.inf'"),
        ("learning_rate: 1:30", "--learning-rate takes a number, not '1:30'"),
        ("hidden_sizes: [4, 3, 2, 010_0x]", "--hidden-sizes"),
        ("precision: 16", "--precision"),
    ],
)
def test_other_spellings_of_numbers_are_refused_rather_than_converted(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


def random_settings(random):
    # fmt: off
    texts = (
        "no", "0123", "1e3", "null", "a: b", "", "ü", "~", "- x", "a #b", "true", "1_000", "-1",
        "2024-01-02", "'", '"', " padded ", "two\nlines", "<<", "=", "!tag", "&a", "*a", "\udcff",
        "None", "%", "@", "[1]", "{}", "\t", "\u2028", "👍",
    )
    # fmt: on
    text = [text for text in texts if text != "None"]  # to tyro nothing
    settings = {
        "recipe": random.choice(list(RECIPES)),
        "seed": random.choice([0, 10, 8, 123, 2**40]),
        "hidden_sizes": tuple(random.choices(range(144, 2000, 144), k=4)),
        "learning_rate": random.choice([1e-05, 0.1, 1e-300, 123456.789, random.random()]),
        "momentum": random.random(),
        "run_name": random.choice([None, "no", "0123", "1_000", "null", "1e3", "2024-01-02"]),
        "data_dir": Path(random.choice(["/a b/c", "ü", "no", "0123", "a/~", "-x", "a: b #c"])),
        "wandb_group": random.choice([None, "--fresh", *text]),
        "wandb_project": random.choice([None, "-h", *text]),
        "wandb_tags": tuple(random.choices(texts, k=random.randrange(4))),
    }
    return RECIPES[settings["recipe"]] | settings


@pytest.mark.parametrize("seed", range(40))
def test_every_configuration_reads_its_own_file_back(tmp_path, seed):
    config = TrainConfig(**random_settings(Random(seed)))
    config = dataclasses.replace(config, wandb_tags=("--fresh",) * (seed % 2) + config.wandb_tags)
    again = from_file(tmp_path, yaml.safe_dump(to_yaml(config), sort_keys=False))
    assert dataclasses.replace(again, config=None) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_reads_its_own_file_back(tmp_path, recipe):
    config = parse_train_config(["--recipe", recipe])
    again = from_file(tmp_path, yaml.safe_dump(to_yaml(config), sort_keys=False))
    assert dataclasses.replace(again, config=None) == config


def bomb(first, line, levels):
    """Every level is the one before it, nine times."""
    levels = [line.format(n, ", ".join([f"*a{n - 1}"] * 9)) for n in range(1, levels)]
    return "\n".join([f"seed: &a0 {first}", *levels])


BOMBS = {
    "lists": (bomb("[x, x]", "k{0}: &a{0} [{1}]", 30), "more than 16 aliases"),
    "merges": (bomb("{x: 1}", "k{0}: &a{0} {{<<: [{1}]}}", 30), "more than 16 aliases"),
    "list in itself": ("seed: &a [*a]", "--seed takes a plain value"),
    "mapping in itself": ("&a {seed: *a}", "--seed takes a plain value"),
    "deep": ("[" * 20_000, "recursion"),
    "deep, block": ("- " * 20_000, "recursion"),
    "deep, mappings": ("{a: " * 9_000, "recursion"),
    "long": ("seed: " + "0" * 65_531, "longer than 65,536 bytes"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_end_in_one_line(tmp_path, kind):
    text, expected = BOMBS[kind]
    message = refusal(tmp_path, text)
    assert expected in message and len(message) < 500


def test_recorded_settings_have_their_types_and_no_repetition(tmp_path):
    config = TrainConfig(runs_dir=tmp_path, run_name="run", wandb_tags=("010",))
    file = tmp_path / "run" / "config.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(to_yaml(config)))
    assert read_yaml(file) == to_yaml(config)
    file.write_text("seed: 0\nepochs: 1\nseed: 1\n")
    with ExitStack() as stack, pytest.raises(InputError) as caught:
        open_run(config, World(), stack)
    assert str(caught.value) == f"{file}: seed is given twice, in lines 1 and 3"


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
    code = (
        "import sys, mnist.training.config, mnist.evaluation.config, mnist.figures;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def on_terminal(columns, words, **environment):
    """What a program prints on a terminal of so many columns, and its exit code."""
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        os.environ.pop("COLUMNS", None)
        os.environ |= {"TERM": "xterm-256color"} | environment
        os.execv(words[0], words)
    said = b""
    with contextlib.suppress(OSError):  # its end
        while part := os.read(master, 1 << 16):
            said += part
    return said.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("columns", [20, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistake_is_one_plain_line_on_a_terminal_too(columns, encoding):
    words = [sys.executable, JOB, "--batch-size", "many"]
    said, code = on_terminal(columns, words, PYTHONIOENCODING=encoding)
    assert said == "train.py: --batch-size takes a whole number, not 'many'\r\n" and code == 2


def test_help_fits_80_columns_of_a_terminal():
    said, code = on_terminal(80, [sys.executable, JOB, "--help"])
    assert code == 0 and "\x1b" not in said and "--learning-rate" in said
    assert max(map(len, said.splitlines())) <= 80


def test_interrupted_while_it_imports_says_nothing():
    # At any moment from the first line of the job on: here in the midst of the first import.
    program = (
        "import runpy, signal, sys; sys.argv = ['train.py', '--help'];"
        "sys.meta_path.insert(0, type('Interrupts', (), {'find_spec': lambda self, name, *rest:"
        " signal.raise_signal(signal.SIGINT) if name == 'tyro' else None})());"
        f"runpy.run_path({JOB!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGINT and done.stdout == done.stderr == b""


def test_home_is_resolved_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("runs_dir: ~/runs\n")
    config = parse_train_config(["--config=~/run.yaml", "--data-dir=~/data"])
    assert (config.runs_dir, config.data_dir) == (tmp_path / "runs", tmp_path / "data")
    assert parse_evaluate_config(["--run=~/runs/x"]).run == tmp_path / "runs/x"
    assert parse_train_config(["--runs-dir", "a/~"]).runs_dir == Path("a/~")
    with pytest.raises(InputError, match="--runs-dir ~nobody-of-this-name/x"):
        parse_train_config(["--runs-dir", "~nobody-of-this-name/x"])
