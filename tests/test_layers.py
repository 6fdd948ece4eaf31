"""The house: imports go down the layers only, nothing turns in circles, files stay readable in one sitting."""

import ast
import graphlib
from pathlib import Path

import pytest

import switchkd

SOURCE = Path(switchkd.__file__).parent
LONGEST_FILE = 420

# Floors of the house, lowest first: files of the root and folders. Imports go down or stay on their floor.
LAYERS = (
    (
        *("errors", "chunks", "fusing", "other_names", "plugins", "policy_options", "objective_names", "data_options"),
        "sources",
        *("rollout", "divergences", "sampling"),
    ),
    ("models", "policies", "cli", "page"),
    ("objective", "data", "methods"),
    ("engine", "vllm"),
    ("evaluation",),
    ("training",),
    ("commands",),
    ("compare",),
    ("demo", "recipes", "report"),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
# The package's own names, and `python -m`: not part of any layer.
ENTRANCES = {"__init__", "__main__"}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def named_by_string(call: ast.Call) -> list[str]:
    """What `import_module("switchkd.a.b")` imports; of an f-string the beginning is known."""
    if getattr(call.func, "id", getattr(call.func, "attr", "")) not in ("import_module", "__import__"):
        return []
    argument = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
    return [argument.value.rstrip(".")] if isinstance(argument, ast.Constant) else []


def imports_of(path: Path) -> set[str]:
    """Dotted names below the package that a file imports, inside functions and by string too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        elif isinstance(node, ast.Call):
            names = named_by_string(node)
        found |= {name.removeprefix("switchkd.") for name in names if name.startswith("switchkd.")}
    return found & modules().keys()


def layer_of(module: str) -> int:
    name = module.split(".")[0]
    assert name in LAYER_OF, f"add {name} to LAYERS"
    return LAYER_OF[name]


def test_every_file_has_a_layer():
    missing = {name.split(".")[0] for name in modules()} - LAYER_OF.keys() - ENTRANCES
    assert missing == set(), "add these files to LAYERS"


@pytest.mark.parametrize("name", sorted(modules().keys() - ENTRANCES))
def test_imports_go_down_the_layers_only(name):
    upwards = {other for other in imports_of(modules()[name]) if layer_of(other) > layer_of(name)}
    assert upwards == set()


def test_a_string_that_imports_upwards_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('import_module("switchkd.compare.tasks"); import_module(f"switchkd.commands.{name}")')
    assert imports_of(path) == {"compare.tasks", "commands"}


def test_folders_do_not_import_each_other_in_circles():
    """Also not on one floor, where the table alone would allow it."""
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        if name not in ENTRANCES:
            folder = name.split(".")[0]
            graph.setdefault(folder, set()).update({other.split(".")[0] for other in imports_of(path)} - {folder})
    graphlib.TopologicalSorter(graph).prepare()


def test_no_imports_in_circles():
    graph = {name: imports_of(path) - {name} for name, path in modules().items() if name not in ENTRANCES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", sorted(modules().values()), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_longer_than_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_no_file_is_a_drawer_for_everything():
    assert not {"utils", "util", "helpers", "misc", "common"} & {part for name in modules() for part in name.split(".")}
