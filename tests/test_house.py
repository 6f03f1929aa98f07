"""The house: imports run downwards only, modules and functions stay short. See docs/develop.md."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnist"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
}

# From the top down. On each floor are rooms (folders), or modules that are a room of their own; one
# may use those below, and none above or beside it.
FLOORS = [
    {"jobs", "launch", "sweep", "tracking"},  # the last two are commands of earlier versions
    {"training", "reading", "export"},
    {"evaluation"},
    {"runs", "model", "normaliser"},
    {"data", "fetch", "distributed", "figures", "pace"},
    {"arrays", "meeting", "pictures", "products", "shared_memory", "threads"},
    {"cli", "system"},
]
LONG_FUNCTIONS = {"mnist.training.loop.fit"}  # reads from top to bottom, as a method section does


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "mnist" else parts[1] if len(parts) > 1 else "mnist"


def floor(module: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert found, f"{module} has no floor yet: give it one in FLOORS and in docs/develop.md"
    return found[0]


def imports(module: str, source: str) -> Iterator[str]:
    """The modules of this project that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by a relative name"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inner]
        yield from {name for name in names if name.split(".")[0] in ("mnist", "jobs")} - {module}


def wrong_arrow(module: str, imported: str) -> str:
    """Why a module may not import another, or ""."""
    if room(module) == room(imported) or floor(imported) > floor(module):
        return ""
    way = "up" if floor(imported) < floor(module) else "sideways"
    return f"{module} imports {imported}: {way}"


ARROWS = {
    module: set(imports(module, path.read_text()))
    for module, path in MODULES.items()
    if path != PACKAGE / "__init__.py"  # the public face
}


@pytest.mark.parametrize("module", ARROWS)
def test_imports_run_downwards(module):
    assert not list(filter(None, (wrong_arrow(module, other) for other in ARROWS[module])))


def test_no_circles():
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_wrong_arrows_are_seen():
    source = "def later():\n    from mnist.training import loop\n\nimport mnist.figures"
    assert set(imports("mnist.runs.sweep", source)) == {"mnist.training.loop", "mnist.figures"}
    assert wrong_arrow("mnist.runs.sweep", "mnist.training.loop").endswith(": up")
    assert wrong_arrow("mnist.data", "mnist.figures").endswith(": sideways")
    assert wrong_arrow("mnist.training.job", "mnist.reading.job").endswith(": sideways")
    assert not wrong_arrow("mnist.training.job", "mnist.training.loop")
    assert not wrong_arrow("mnist.runs.tracking", "mnist.figures")
    with pytest.raises(AssertionError, match="no floor yet"):
        wrong_arrow("mnist.attic", "mnist.cli")


@pytest.mark.parametrize("module", MODULES)
def test_no_long_modules_and_functions(module):
    source = MODULES[module].read_text()
    longest = 40 if module.startswith("jobs") else 400
    assert len(source.splitlines()) <= longest
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and f"{module}.{node.name}" not in LONG_FUNCTIONS:
            assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"
