"""What the command lines of all jobs share: options, YAML files of settings, exit codes.

The settings of a job are a frozen dataclass beside that job. Imports no torch, so that ``--help``
and a mistyped option answer at once.
"""

import contextlib
import dataclasses
import gc
import io
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin

import yaml


class InputError(ValueError):
    """A user's mistake: a job prints it as one line and exits with code 2."""


class WorldError(RuntimeError):
    """Another process is gone: a job prints it as one line and exits with code 1."""


EXIT_CODE_FILE = "MNIST_EXIT_CODE_FILE"
"""The environment variable by which ``mnist.launch`` asks rank 0 for the job's exit code: torch's
launcher does not tell it when it was itself interrupted."""


Config = TypeVar("Config")  # a dataclass of settings


def require(config: Any, condition: bool, field: str, takes: str) -> None:
    """Raise an InputError that names the option, unless the condition holds."""
    if not condition:
        value = getattr(config, field)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise InputError(f"{option(field)} takes {takes}, not {shown}")


def require_processes(config: Any) -> None:
    """Of the settings that every job has."""
    for field in ("threads", "expect_world_size"):
        value = getattr(config, field)
        require(config, value is None or value >= 1, field, "1 or more")


def option(field: str) -> str:
    """A field's name as typed on the command line."""
    return "--" + field.replace("_", "-")


# ----------------------------------------------------------------------- YAML files of settings

_MOST_BYTES = 1 << 16  # of a file of settings; PyYAML takes a second for so many
_MOST_ALIASES = 16


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which no key is given twice; one beside a merge (``<<``) may override it."""

    _aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # Lists of lists of aliases, or merges of merges, double with every line.
        self._aliases += self.check_event(yaml.AliasEvent)
        if self._aliases > _MOST_ALIASES:
            raise InputError(f"more than {_MOST_ALIASES} aliases (*); write the values out")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # Later, keys that are written and keys that are merged can no longer be told apart.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise InputError(
                        f"{_shown(key.value)} is given twice, in lines {lines[name]} and {line}"
                    )
                lines[name] = line
        return node


class _VerbatimLoader(UniqueKeyLoader):
    """Numbers, dates, true and false stay the text that is written; nothing (null) is None.

    YAML 1.1 reads 010 as 8, 1:30 as 90, 1_000 as 1000 and no as false.
    """

    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        **yaml.SafeLoader.yaml_constructors,
        **{
            f"tag:yaml.org,2002:{kind}": yaml.SafeLoader.construct_yaml_str
            for kind in ("bool", "int", "float", "timestamp", "value")
        },
    }


def read_yaml(path: Path, loader: type[UniqueKeyLoader] = UniqueKeyLoader) -> Any:
    """The content of a YAML file of settings.

    Raises:
        InputError: it is no YAML, gives a key twice, or is too large for settings.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    try:
        if len(content) > _MOST_BYTES:
            raise InputError(f"not a file of settings: longer than {_MOST_BYTES:,} bytes")
        return yaml.load(content, loader)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a YAML file: {reason}") from None


def read_settings(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The ``known`` settings of a --config file and their values as written: texts, lists of texts,
    or None.

    Raises:
        InputError: the file cannot be read, or holds anything else.
    """
    try:
        settings = read_yaml(path, _VerbatimLoader)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"--config {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected lines of 'setting: value'")
    unknown = [_shown(str(key)) for key in settings if key not in known]
    if unknown:
        raise InputError(
            f"--config {path}: unknown setting {', '.join(unknown)}; known are {', '.join(known)}"
        )
    for field, value in settings.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(_could_be_typed, values)):
            raise InputError(
                f"--config {path}: {option(field)} takes a plain value, or a list of them without "
                "null (unquoted), lists, mappings or binary data"
            )
    return settings


def _could_be_typed(value: Any) -> bool:
    """Whether a command line can hold it."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a pair
        return False


def _shown(text: str) -> str:
    return text if text.isprintable() else repr(text)


def as_options(settings: dict[str, Any], config: type) -> list[str]:
    """What ``read_settings`` gives as command-line words, so that one parser checks both.

    Values follow an =, which makes a value of what begins with - as well.

    Raises:
        InputError: a value that no word can stand for.
    """
    types = {field.name: field.type for field in dataclasses.fields(config)}
    words: list[str] = []
    for field, value in settings.items():
        name = option(field)
        if value is None:
            if getattr(config, field) is not None:
                raise InputError(f"{name} takes a value, not nothing")
            words.append(f"{name}=None")  # tyro's word for it
        elif types[field] is bool:
            truth = yaml.SafeLoader.bool_values.get(str(value).lower())
            if truth is None:
                raise InputError(f"{name} takes true or false, not {_shown(str(value))}")
            words.append(name if truth else option(f"no_{field}"))
        elif get_origin(types[field]) is tuple:
            values = value if isinstance(value, list) else [value]
            for later in values[1:]:
                if later.startswith("-") and (later == "--" or later.lstrip("-")[:1].isalpha()):
                    raise InputError(
                        f"{name} takes {_shown(later)} as the first of its values only"
                    )
            words += [f"{name}={values[0]}", *values[1:]] if values else [name]
        elif isinstance(value, list):
            raise InputError(f"{name} takes one value, not the list {_shown(', '.join(value))}")
        elif value == "None" and types[field] == str | None:
            raise InputError(f"{name} takes null for nothing, not None")
        else:
            words.append(f"{name}={value}")
    return words


# --------------------------------------------------------------------------- the command line

_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def as_typed(arguments: Sequence[str], config: type) -> list[str]:
    """Command-line words as tyro takes them, of those that others write, too.

    Agents of W&B's sweeps pass --nesterov=True and --hidden_sizes="[512, 256, 128, 64]". Those of a
    file are not for this: there, a text is what is written.

    Raises:
        InputError: a value that is neither true nor false, of an option that takes these.
    """
    types = {option(field.name): field.type for field in dataclasses.fields(config)}
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        typed, joined, value = word.partition("=")
        name = typed.replace("_", "-")
        kind = types.get(name) or (types.get("--" + name.removeprefix("--no-")))
        if not (word.startswith("--") and kind):
            words.append(word)
            continue
        takes = kind is bool or get_origin(kind) is tuple or type(None) in get_args(kind)
        if takes and not joined and rest and not rest[0].startswith("-"):
            joined, value = "=", rest.pop(0)
        if not (takes and joined):
            words.append(word)
        elif kind is bool:
            truth = _TRUTH.get(value.lower())
            if truth is None:
                raise InputError(f"{typed} takes true or false, not {_shown(value)}")
            positive = name if name in types else "--" + name.removeprefix("--no-")
            truth = truth == (name == positive)
            words.append(positive if truth else "--no-" + positive.removeprefix("--"))
        elif get_origin(kind) is tuple:
            values = _listed(value, commas=get_args(kind)[0] is not str)
            words += as_options({name.removeprefix("--").replace("-", "_"): values}, config)
        else:
            words.append(f"{typed}={'None' if value == 'null' else value}")
    return words


def _listed(value: str, *, commas: bool) -> list[str]:
    """The values of a list that is written as one word, as JSON and Python do, or with commas."""
    if commas and not value.startswith("["):
        return [part.strip() for part in value.split(",")]
    if not (value.startswith("[") and value.endswith("]")):
        return [value]
    try:
        values = yaml.load(value, _VerbatimLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return [value]
    plain = isinstance(values, list) and all(map(_could_be_typed, values))
    return values if plain else [value]


class _Sheet(io.StringIO):
    """Where tyro writes. It asks for encoding and terminal, to decide on boxes and colours; what is
    parsed here must not depend on those of the user."""

    encoding = "utf-8"


def parse_options(arguments: Sequence[str], default: Config, job: str) -> Config:
    """``default`` with what the words of a command line change; ``--help`` prints and ends.

    Args:
        arguments: the words, as ``as_typed`` or ``as_options`` give them.
        default: the settings that hold where no word says otherwise.
        job: the program's name.

    Raises:
        InputError: an unknown option, a wrong type or a value out of range.
    """
    import tyro  # 0.05 s, which processes that have no command line need not wait for

    wants_help = bool({"-h", "--help"} & set(arguments))
    width = min(100, max(60, shutil.get_terminal_size().columns)) if wants_help else 1_000_000
    sheet, columns = _Sheet(), os.environ.get("COLUMNS")
    if wants_help:
        sheet.encoding = (sys.stdout.encoding or "ascii").lower()
    os.environ["COLUMNS"] = str(width)  # which is where tyro reads it, before the terminal's own
    try:
        with contextlib.redirect_stdout(sheet), contextlib.redirect_stderr(sheet):
            config = tyro.cli(type(default), prog=job, args=list(arguments), default=default)
        return _expand_homes(config)
    except SystemExit as stop:
        if not stop.code:  # --help
            print(sheet.getvalue(), end="")
            raise
        raise InputError(_first_sentence(sheet.getvalue())) from None
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _expand_homes(config: Config) -> Config:
    """Paths with their ``~`` resolved: a shell does so only at the beginning of a word."""
    paths: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, config)):
        value = getattr(config, field.name)
        if isinstance(value, Path) and value.parts[:1] and value.parts[0].startswith("~"):
            try:
                paths[field.name] = value.expanduser()
            except RuntimeError as error:
                raise InputError(f"{option(field.name)} {value}: {error}") from None
    return dataclasses.replace(cast(Any, config), **paths) if paths else config


def _first_sentence(box: str) -> str:
    """The first section of tyro's framed error message, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if not line.strip("─╭╮╰╯")]
    text = " ".join(lines[1 : rules[0] if rules else None])
    text = re.sub(r"^Error parsing (\w+Config|None): ", "", text)
    text = re.sub(
        r"^Error parsing (\S+): invalid literal for int.*: ", r"\1 takes a whole number, not ", text
    )
    text = re.sub(
        r"^Error parsing (\S+): no type matching \S*INT could .* from \[(.*)\]\.?$",
        r"\1 takes a whole number, not \2",
        text,
    )
    return re.sub(r"^Error parsing (\S+): could not convert .*: ", r"\1 takes a number, not ", text)


# -------------------------------------------------------------------------------- exit codes


@contextlib.contextmanager
def exit_codes(job: str) -> Iterator[None]:
    """Run the main part of ``job`` and end the process: 0 done, 2 bad input, 75 interrupted and
    saved, 130 Ctrl-C, 1 a bug or a lost process.

    Torch's own teardown takes 0.5 s of a process's life and frees what the kernel frees anyway,
    so the process ends without it.
    """
    gc.disable()  # importing torch creates much and drops little: 0.3 s of 2.6 s saved
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with a closed descriptor
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of what its encoding does not have
    code = 0
    try:
        yield
    except InputError as error:
        code = 2
        if os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
            # Every process of a machine finds the same mistake. Let the first one say it, whose
            # end ends this one too; an error that it does not have is said after all.
            time.sleep(10)
        print(f"{job}: {error}", file=sys.stderr)
    except WorldError as error:
        code = 1
        print(f"{job}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # whoever read the output has gone
        code = 141
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    if os.environ.get("RANK", "0") == "0" and os.environ.get(EXIT_CODE_FILE):
        with contextlib.suppress(OSError):
            Path(os.environ[EXIT_CODE_FILE]).write_text(str(code))
    os._exit(code)
