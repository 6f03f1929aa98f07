"""README and docs: links lead somewhere, command lines parse, tables of options are the code's own.

.venv/bin/python tests/test_docs.py    # writes the generated tables of docs/settings.md anew
"""

import argparse
import ast
import contextlib
import importlib.util
import inspect
import io
import itertools
import re
import shlex
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from mnist.evaluation.config import EvaluateConfig, parse_evaluate_config
from mnist.export.config import ExportConfig, parse_export_config
from mnist.reading.config import ReadConfig, parse_read_config
from mnist.training.config import RECIPES, TrainConfig, parse_train_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REWRITE = ".venv/bin/python tests/test_docs.py"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))]

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="no docs here: the image has none")


class PageError(Exception):
    """What a page says is not so."""


# ------------------------------------------------------------------------------------- pages


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@cache
def prose_of(page: str) -> str:
    """A page with its code blocks emptied; lines keep their numbers."""
    lines = text_of(page).splitlines()
    for number, _, _ in block_lines(page):
        lines[number - 1] = ""
    return "\n".join("" if re.match(r" *(```|~~~)", line) else line for line in lines)


def block_lines(page: str) -> Iterator[tuple[int, str, str]]:
    """Numbered lines of a page's code blocks, with the block's language."""
    fence = language = ""
    for number, line in enumerate(text_of(page).splitlines(), 1):
        mark = re.match(r" *(```+|~~~+)(.*)", line)
        if mark and not fence:
            fence, language = mark[1], mark[2].strip()
        elif mark and mark[1] == fence:
            fence = ""
        elif fence:
            yield number, language, line


def shell_lines(page: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a page's ``bash`` blocks, those that end with a backslash joined."""
    begun, line, end = 0, "", ""
    for number, language, raw in block_lines(page):
        if end:  # of a document within the block
            end = "" if raw == end else end
        elif language == "bash":
            begun, line = (begun, line + raw) if line else (number, raw)
            if line.endswith("\\"):
                line = line[:-1]
                continue
            if here := re.search(r"<<-?\s*['\"]?(\w+)", line):
                line, end = line[: here.start()], here[1]
            yield begun, line
            line = ""


def spans(page: str) -> Iterator[tuple[int, str]]:
    """Numbered pieces of inline code; one may go over the end of a line."""
    prose = prose_of(page)
    for found in re.finditer(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", prose, re.DOTALL):
        yield prose.count("\n", 0, found.start()) + 1, " ".join(found[2].split())


def problems(page: str, found: Iterator[tuple[int, str]], check: Callable[[str], None]) -> str:
    """What ``check`` says of numbered pieces of a page, by line; nothing if it passes them all."""
    said = []
    for number, piece in found:
        try:
            check(piece)
        except PageError as mistake:
            said.append(f"{page}:{number}: {piece}\n    {mistake}")
    return "\n".join(said)


# ------------------------------------------------------------------------------------- links


def links(page: str) -> Iterator[tuple[int, str]]:
    """Numbered targets of links and pictures."""
    prose = re.sub(r"`[^`\n]*`", "", prose_of(page))
    pattern = r"""\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)="([^"]*)"|^\[[^\]]+\]:\s*(\S+)"""
    for found in re.finditer(pattern, prose, re.MULTILINE):
        yield prose.count("\n", 0, found.start()) + 1, found[1] or found[2] or found[3]


@cache
def anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", prose_of(page), re.MULTILINE):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        numbered = (f"{anchor}-{i}" for i in itertools.count(1))
        found.add(anchor if anchor not in found else next(n for n in numbered if n not in found))
    return found


def target_of(page: str, link: str) -> str | None:
    """The file that a link leads to, from the root; None for one to another site."""
    if re.match(r"[a-z]+:", link):
        return None
    path = link.partition("#")[0]
    if path.startswith("/"):
        raise PageError("is not relative")
    target = (ROOT / page).parent / path if path else ROOT / page
    if not target.resolve().is_relative_to(ROOT) or not target.exists():
        raise PageError("leads nowhere")
    return target.resolve().relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    def check(link: str) -> None:
        target, anchor = target_of(page, link), link.partition("#")[2]
        if target and anchor and anchor not in anchors(target):
            raise PageError(f"{target} has no such heading; it has {sorted(anchors(target))}")

    said = problems(page, links(page), check)
    assert not said, said


def test_whatever_is_in_docs_can_be_reached_from_the_readme():
    reached, rest = set(), ["README.md"]
    while rest:
        page = rest.pop()
        reached.add(page)
        for _, link in links(page) if page.endswith(".md") else ():
            with contextlib.suppress(PageError):
                target = target_of(page, link)
                rest += [target] if target and target not in reached else []
    files = {path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*") if path.is_file()}
    assert files - reached == set()


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 130


def test_what_the_readme_says_is_where_is_there():
    block = text_of("README.md").partition("\n## Where things are\n")[2]
    names = set(re.findall(r"^ *(\w+/)|\b(\w+\.(?:py|html))\b", block, re.MULTILINE))
    names = {folder or file for folder, file in names}
    package = {path.name for path in (ROOT / "mnist").glob("[!_]*.py")}
    rooms = {f"{path.parent.name}/" for path in (ROOT / "mnist").glob("*/__init__.py")}
    # Commands of earlier versions.
    assert (package | rooms) - names == {"sweep.py", "tracking.py"}
    assert all((ROOT / name).exists() or (ROOT / "mnist" / name).exists() for name in names)


@pytest.mark.parametrize("page", PAGES[1:])
def test_a_page_begins_with_a_command(page):
    lines = [line for line in text_of(page).splitlines() if line]
    assert lines[0].startswith("# ")
    assert lines[1] == "```bash", f"{page}: first, the command that most readers came for"


# ------------------------------------------------------------------------------------- commands

# Options of others, as far as pages name them; of docker's, whether a value is the next word.
PYTEST = {"--durations"}
SBATCH = {"--nodes", "--gpus-per-node", "--cpus-per-task", "--array", "--partition", "--time"}
DOCKER = {"--rm": False, "--read-only": False, "--user": True, "-v": True, "-t": True}
DOCKER |= {"--gpus": True, "--network": True, "--tmpfs": True, "--shm-size": True}
DOCKER |= {"--stop-timeout": True, "--build-arg": True, "--secret": True}
# What else a block may begin a line with. A word that is unknown is a mistake.
OTHERS = set("cd cp diff done for git jupyter mkdir pip scancel sha256sum tail wandb".split())


def check_line(line: str) -> None:
    """A line of a block: every command in it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    variables: dict[str, str] = {}
    for simple, some in itertools.groupby(lexer, lambda word: not set(word) <= set(";&|()")):
        command = list(itertools.takewhile(lambda word: not set(word) <= set("<>"), some))
        if command[0] == "for":  # name in first …
            variables[f"${command[1]}"] = command[3]
        command = [variables.get(word, word) for word in command[command[0] == "do" :]]
        if simple and not check_command(command):
            raise PageError(f"no command that is known here: {command[0]}")


def check_span(text: str) -> None:
    """Inline code, if it is a command, an option, or the name of a file or module."""
    try:
        words = shlex.split(text)
    except ValueError:
        return  # no command
    name = words[0] if words else ""
    if name.startswith("-") and len(name) > 2:
        check_options(words)
    elif re.match(r"(\.ci|docs|jobs|mnist|scripts|slurm|tests)/", name) and not words[1:]:
        if not any(ROOT.glob(name)):
            raise PageError("no such file")
    elif re.fullmatch(r"mnist(\.[a-z_]+)+", text):
        check_module(text)
    else:
        check_command(words)


def check_command(words: list[str]) -> bool:
    """Whether this is a command that is known here; a PageError says that it is wrong.

    What stands for something of the reader's is left out, or gets a value.
    """
    words = [w for w in words if w != "…" and not w.startswith("[")]
    words = [re.sub(r"(^|=)N$", r"\g<1>1", w) for w in words]
    words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))
    if not words:
        return True
    name, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if name in COMMANDS:
        COMMANDS[name](rest)
    elif name.startswith(("scripts/", "slurm/", "tests/")):
        check_script(name, rest)
    else:
        return name in OTHERS
    return True


def check_script(name: str, words: list[str]) -> None:
    if not (ROOT / name).is_file():
        raise PageError(f"no such file: {name}")
    if name in ("scripts/train", "scripts/evaluate", "scripts/read"):
        check_job(f"jobs/{name.removeprefix('scripts/')}.py", without_launchers(words))
    elif name == "scripts/export":
        check_words(name, words)
    elif name == "slurm/pipeline.sh":
        of_sbatch = words[: words.index("--")] if "--" in words else []
        check_sbatch([*of_sbatch, "slurm/train.sbatch", *words[len(of_sbatch) :]])
    elif name == "scripts/test":
        check_files(words)
    else:
        check_text(name, words)


def check_job(script: str, words: list[str]) -> None:
    """Options of a job, by its own parser. In prose a job without any is but its name."""
    if script not in PARSERS or not (ROOT / script).is_file():
        raise PageError(f"no job {script}")
    if "--config" in words:  # a file that the reader has yet to write
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    if words:
        check_words(script, words)


def check_words(script: str, words: list[str]) -> None:
    """By its own parser."""
    try:
        # --help ends with 0; what is wrong is a ValueError.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            PARSERS[script](words)
    except ValueError as error:
        raise PageError(str(error)) from None


def without_launchers(words: list[str]) -> list[str]:
    """The options of a job alone, without those of mnist.launch, which take a value each."""
    left = []
    for word in (rest := iter(words)):
        if word.partition("=")[0] not in launchers_options():
            left.append(word)
        elif "=" not in word and not next(rest, "").isdecimal():
            raise PageError(f"{word} takes a number")
    return left


@cache
def launchers_options() -> set[str]:
    source = Path(importlib.util.find_spec("mnist.launch").origin).read_text()
    return set(re.findall(r"""add_argument\(\s*["'](--[\w-]+)""", source))


def check_launch(words: list[str]) -> None:
    """``accelerate launch …`` and ``torchrun …``, by their own parsers, then the job."""
    if words[:1] == ["launch"]:
        from accelerate.commands.launch import launch_command_parser as parser_of
    elif words[:1] == ["torchrun"]:
        from torch.distributed.run import get_args_parser as parser_of
    else:
        raise PageError(f"accelerate {' '.join(words)} is not for a job")
    words = words[1:]
    if not any(word.endswith(".py") for word in words):
        words = [*words, "jobs/train.py"]  # which prose leaves out
    found = parsed(parser_of(), words)
    check_job(found.training_script, found.training_script_args)


def parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(words)
    except SystemExit:
        raise PageError(said.getvalue().strip().splitlines()[-1]) from None


def check_python(words: list[str]) -> None:
    words = list(itertools.dropwhile(re.compile(r"-[PIu]+$").match, words))
    if words[:1] == ["-m"]:
        check_module(words[1])
        check_files(words[2:] if words[1] == "pytest" else [])
    elif words and words[0].startswith("jobs/"):
        check_job(words[0], words[1:])
    elif words and words[0].endswith(".py"):
        check_text(words[0], words[1:])


def check_sbatch(words: list[str]) -> None:
    options = list(itertools.takewhile(lambda word: word.startswith("-"), words))
    for option in options:
        if option.partition("=")[0] not in SBATCH:
            raise PageError(f"{option}: if sbatch has it, name it in SBATCH")
    if not words[len(options) :]:
        return  # prose, of sbatch itself
    script, *words = words[len(options) :]
    if not re.fullmatch(r"slurm/\w+\.sbatch", script) or not (ROOT / script).is_file():
        raise PageError(f"no job {script}")
    words = [word for word in words if word != "--"]
    several = [word.split(",") if script == "slurm/sweep.sbatch" else [word] for word in words]
    for i in range(max(map(len, several), default=0)):  # every value of a grid once
        job = f"jobs/{Path(script).stem}.py".replace("sweep", "train")
        check_job(job, [values[i % len(values)] for values in several])


def check_docker(words: list[str]) -> None:
    """The engine's options by a list, then what scripts/container.py makes of the others."""
    command, rest = words[0] if words else "", iter(words[1:])
    for word in rest:
        if not word.startswith("-"):
            if command == "run" and word == "mnist":
                runs = containers().command_of(list(rest))
                if not check_command([runs[0].removeprefix(f"{ROOT}/"), *runs[1:]]):
                    raise PageError(f"no command that is known here: {runs[0]}")
            return
        check_docker_option(word, next(rest, "") if DOCKER.get(word) else "")


def check_docker_option(option: str, value: str) -> None:
    if option not in DOCKER:
        raise PageError(f"{option}: if docker has it, name it in DOCKER")
    argument = value.partition("=")[0]
    if option == "--build-arg" and f"\nARG {argument}=" not in (ROOT / "Dockerfile").read_text():
        raise PageError(f"Dockerfile has no argument {argument}")


@cache
def containers() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("container", ROOT / "scripts/container.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_module(name: str) -> None:
    """A module, or a name that stands in one's text."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(name):
            return
    parent, _, last = name.rpartition(".")
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(parent) if parent else None
        if spec and re.search(rf"\b{last}\b", Path(spec.origin).read_text()):
            return
    raise PageError(f"no module {name}")


def check_files(words: list[str]) -> None:
    """Of pytest: that the files are there."""
    for word in words:
        if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists():
            raise PageError(f"no such file: {word}")


def check_text(script: str, words: list[str]) -> None:
    """Options and sub-commands of a script, which are in its text; values follow an option."""
    names = [name for name in (script, f"{script}.py") if (ROOT / name).is_file()]
    if not names:
        raise PageError(f"no such file: {script}")
    text = "\n".join((ROOT / name).read_text() for name in names)
    for before, word in itertools.pairwise([script, *words]):
        named = word.startswith("--") or (before[:2] != "--" and not word.isdecimal())
        if named and not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
            raise PageError(f"{script} knows nothing of {word}")


def check_options(words: list[str]) -> None:
    """An option that is named alone, or some with their values."""
    ours = without_launchers(words)
    options = {w.partition("=")[0].replace("_", "-") for w in ours if w.startswith("-")}
    if words[0] in DOCKER:
        for option, value in itertools.pairwise([*words, ""]):
            check_docker_option(option, value) if option in DOCKER else None
    elif len(ours) > len(options) and options <= options_of("jobs/train.py"):
        check_command(["scripts/train", *ours])
    elif unknown := options - known_options():
        raise PageError(f"nothing here has {', '.join(sorted(unknown))}")


@cache
def options_of(job: str) -> set[str]:
    """The options that --help of a job lists."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        PARSERS[job](["--help"])
    lines = [line.strip("│| ") for line in said.getvalue().splitlines()]
    lists = [re.match(r"(?:-h, )?--[a-z][a-z-]*(?:, --[a-z-]+)*", line) for line in lines]
    return {option for found in lists if found for option in re.findall(r"--[a-z-]+", found[0])}


@cache
def known_options() -> set[str]:
    """Of the jobs, scripts, pytest, sbatch and launchers, with - for _."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    known = set().union(*map(options_of, PARSERS), launchers_options(), PYTEST, SBATCH)
    for parser in (launch_command_parser(), get_args_parser()):
        known |= {
            name.replace("_", "-") for action in parser._actions for name in action.option_strings
        }
    for path in [*ROOT.glob("scripts/*"), ROOT / "tests/stress.py"]:
        if path.is_file():
            known |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text()))
    return known


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "jobs/train.py": parse_train_config,
    "jobs/evaluate.py": parse_evaluate_config,
    "jobs/read.py": parse_read_config,
    "scripts/export": parse_export_config,
}
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": check_launch,
    "torchrun": lambda words: check_launch(["torchrun", *words]) if words else None,
    "python": check_python,
    "sbatch": check_sbatch,
    "docker": check_docker,
}


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_blocks_parse(page):
    said = problems(page, shell_lines(page), check_line)
    assert not said, said


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_in_blocks_of_bash(page):
    ours = r"(\$ |\.venv/bin/)?((scripts|slurm)/\w|accelerate |torchrun |sbatch |docker |python )"
    others = [(number, line) for number, language, line in block_lines(page) if language != "bash"]
    found = [f"{page}:{number}: {line}" for number, line in others if re.match(ours, line)]
    assert not found, "begin the block with ```bash, so that they are checked:\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_names_in_the_text_are_right(page):
    said = problems(page, spans(page), check_span)
    assert not said, said


# ------------------------------------------------------------------------------------- tables


def option_table(config: type, job: str) -> str:
    """Options with what they take, their defaults and their own documentation."""
    rows = ["| Option | Takes | Default | |", "|---|---|---|---|"]
    hints = get_type_hints(config)
    for field, (default, documentation) in written_in(config).items():
        option = "--" + field.replace("_", "-")
        if option in options_of(job):
            words = " ".join(documentation.split()).replace("|", "\\|")
            words = re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"`\1`", words)
            rows.append(f"| `{option}` | {takes(hints[field])} | {shown(default)} | {words} |")
    return "\n".join(rows)


def written_in(config: type) -> dict[str, tuple[Any, str]]:
    """Defaults and documentation of a dataclass's fields, as its source has them: the default of a
    path, which the environment may say otherwise, is the last text in it."""
    found: dict[str, tuple[Any, str]] = {}
    for one in reversed(config.__mro__[:-1]):
        body = ast.parse(inspect.getsource(one)).body[0].body
        for field, after in itertools.pairwise([*body, ast.Pass()]):
            if not (isinstance(field, ast.AnnAssign) and field.value):
                continue
            if isinstance(field.value, ast.Call):
                default = re.findall(r"'([^']*)'", ast.unparse(field.value))[-1]
            else:
                default = ast.literal_eval(field.value)
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[field.target.id] = default, after.value.value if documented else ""
    return found


def takes(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return takes(next(kind for kind in get_args(hint) if kind is not type(None)))
    if get_origin(hint) is tuple:
        return takes(get_args(hint)[0]) + "s"
    return {int: "integer", float: "number", str: "text", Path: "path", bool: ""}[hint]


def shown(value: Any) -> str:
    """A default, or a recipe's value."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    if isinstance(value, float):
        value = f"{value:g}"
    return "" if value is None or value == "" else f"`{value}`"


def recipe_table() -> str:
    """The settings that recipes change, and to what; the first recipe is the defaults'."""
    defaults = {field: default for field, (default, _) in written_in(TrainConfig).items()}
    rows = [f"| Option | {' | '.join(f'`{name}`' for name in RECIPES)} |"]
    rows.append("|---" * (1 + len(RECIPES)) + "|")
    for field, default in defaults.items():
        values = [recipe.get(field) for recipe in RECIPES.values()]
        if any(value is not None for value in values):
            cells = [shown(default), *map(shown, values[1:])]
            rows.append(f"| `--{field.replace('_', '-')}` | {' | '.join(cells)} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "train options": lambda: option_table(TrainConfig, "jobs/train.py"),
    "evaluate options": lambda: option_table(EvaluateConfig, "jobs/evaluate.py"),
    "read options": lambda: option_table(ReadConfig, "jobs/read.py"),
    "export options": lambda: option_table(ExportConfig, "scripts/export"),
    "recipes": recipe_table,
}


def block(name: str) -> str:
    return f"<!-- generated: {name} -->\n\n{TABLES[name]()}\n\n<!-- end -->"


def generated(text: str) -> str:
    """A page with its tables written anew."""
    for name in TABLES:
        pattern = rf"<!-- generated: {name} -->.*?<!-- end -->"
        new = block(name)
        text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
        assert count == 1, f"docs/settings.md has no place, or several, for {name}"
    return text


@pytest.mark.parametrize("name", TABLES)
def test_a_generated_table_is_the_codes_own(name):
    current = block(name) in text_of("docs/settings.md")
    assert current, f"docs/settings.md differs from the code; {REWRITE} writes its tables anew"


@pytest.mark.parametrize(("name", "job"), [(f"{Path(job).stem} options", job) for job in PARSERS])
def test_a_table_has_the_options_that_help_lists(name, job):
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", TABLES[name](), re.MULTILINE)
    listed = {o for o in options_of(job) if "--" + o.removeprefix("--no-") not in rows}
    assert listed - set(rows) == {"--help"} and len(rows) == len(set(rows)) > 4


if __name__ == "__main__":
    settings = DOCS / "settings.md"
    settings.write_text(generated(settings.read_text()))
