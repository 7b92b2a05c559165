"""The house keeps its plan: imports go down only, a name means one thing, and what can be read whole stays so.

`python tests/test_house.py` draws the layers.
"""

import ast
import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# From the top down. A module imports from its own layer and from those below it
LAYERS = {
    "scripts": ("run_captioning", "captioning.__main__", "captioning.commands"),
    "what a run shows": ("captioning.reporting", "captioning.inference"),
    "training": ("captioning.training", "collator"),
    "rows and scores": ("captioning.data", "captioning.scoring"),
    "models and Hub": ("captioning.models", "captioning.hub", "metrics"),
    "foundation": ("captioning.command_line", "captioning.errors", "captioning.files", "captioning"),
}
HEIGHT = {room: height for height, rooms in enumerate(reversed(LAYERS.values())) for room in rooms}
# Not in requirements.txt, or only needed with a Java runtime: imported where they are asked for
OPTIONAL = {"bert_score", "gradio", "pycocoevalcap"}
# `WORK` of a command: imported by name, when the command is run
BY_NAME = re.compile(r"(captioning(?:\.\w+)+):(\w+)")
FAMILY_WORDS = re.compile(r"\[DEC\]|BlipProcessor|text_decoder|is_fast")
FAMILY_ROOMS = ("captioning.models.blip", "captioning.models.fast_blip", "captioning.models.tokenizer")
# What every checkout has: not what tools leave beside it
LOCAL = {".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__", "outputs", "data", "runs"}


def _read(*patterns: str) -> dict[str, ast.Module]:
    """Return by dotted name the syntax tree of each module."""
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


MODULES = _read("*.py", "captioning/**/*.py")
BENCHMARKS = _read("benchmarks/*.py")


def room_of(module: str) -> str:
    """Return the folder of the package that a module is in; a module outside of any is a room of its own."""
    return next(room for room in sorted(HEIGHT, key=len, reverse=True) if f"{module}.".startswith(f"{room}."))


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of each import below `tree`, those inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the whole name instead of a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loaded_by_name(tree: ast.Module) -> set[tuple[str, str]]:
    """Return each `module:function` that a string of the module names."""
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {found.groups() for text in texts if (found := BY_NAME.fullmatch(text))}


def own_imports(tree: ast.Module) -> set[str]:
    """Return which of our modules a module imports: `from captioning.training import safeguards` is one of them."""
    names = [*imported_names(tree), *(".".join(name) for name in loaded_by_name(tree))]
    ours = ({name, name.rpartition(".")[0]} & MODULES.keys() for name in names)
    return {max(found, key=len) for found in ours if found}


IMPORTS = {module: own_imports(tree) for module, tree in MODULES.items()}


def room_imports() -> dict[str, set[str]]:
    """Return which rooms each room imports from, itself left out."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, imported in IMPORTS.items():
        found[room_of(module)] |= {room_of(name) for name in imported} - {room_of(module)}
    return found


def functions(modules: dict[str, ast.Module]) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each function with the module it is in."""
    for module, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def assert_none(faults: list[str]) -> None:
    assert not faults, "\n".join(sorted(faults))  # text, which pytest does not cut


# --- Imports --------------------------------------------------------------------------------------------------


def test_imports_go_down_only():
    upward = [
        f"{module} -> {name}"
        for module, imported in IMPORTS.items()
        for name in imported
        if HEIGHT[room_of(name)] > HEIGHT[room_of(module)]
    ]
    assert_none(upward)


@pytest.mark.parametrize("graph", [IMPORTS, room_imports()], ids=["modules", "folders"])
def test_no_imports_go_in_a_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_metrics_can_be_loaded_alone():
    """`evaluate.load("metrics.py")` copies the file to where the package is not."""
    assert_none(list(IMPORTS["metrics"]))


def test_no_import_hides_in_a_function_but_those_of_optional_packages():
    assert_none(
        [
            f"{module}.{function.name} imports {name}"
            for module, function in functions(MODULES | BENCHMARKS)
            for name in imported_names(function)
            if name.split(".")[0] not in OPTIONAL
        ]
    )


def test_only_the_commands_are_loaded_by_name_and_what_they_name_exists():
    """Elsewhere an import by name would be an arrow that the tests above do not see."""
    tools = {"importlib", "importlib.import_module"}
    importers = {module for module, tree in MODULES.items() if tools & {*imported_names(tree)}}
    assert importers == {"captioning.__main__", "captioning.scoring.coco"}  # and an optional package
    named = {(room_of(module), *name) for module, tree in MODULES.items() for name in loaded_by_name(tree)}
    assert {room for room, *_ in named} == {"captioning.commands"}
    defined = {(module, function.name) for module, function in functions(MODULES)}
    assert_none([f"{module}:{function}" for _, module, function in named if (module, function) not in defined])


# --- Names ----------------------------------------------------------------------------------------------------


def test_two_functions_or_classes_never_share_a_name():
    places: dict[str, list[str]] = defaultdict(list)
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
                places[node.name].append(module)
    assert_none([f"{name}: {', '.join(modules)}" for name, modules in places.items() if len(modules) > 1])


def test_no_module_imports_a_private_name_of_another():
    private = [
        f"{module} imports {name}"
        for module, tree in MODULES.items()
        for name in imported_names(tree)
        if name.split(".")[0] in ("captioning", "collator", "metrics") and name.split(".")[-1].startswith("_")
    ]
    assert_none(private)


def test_only_the_rooms_of_blip_know_blip():
    """Comments and docstrings may name it as an example; code asks the interface `Captioner`."""
    found = []
    for module, tree in MODULES.items():
        if not module.startswith(FAMILY_ROOMS):
            code = copy.deepcopy(tree)
            for node in ast.walk(code):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    node.value.value = ""  # a docstring
            found += [f"{module}: {word}" for word in FAMILY_WORDS.findall(ast.unparse(code))]
    assert_none(found)


# --- Sizes ----------------------------------------------------------------------------------------------------


def test_the_root_is_quiet():
    entries = {path.name for path in ROOT.iterdir()} - LOCAL
    assert len(entries) <= 24, sorted(entries)


def test_the_script_is_read_at_one_sitting():
    assert len((ROOT / "run_captioning.py").read_text().splitlines()) < 250


def test_no_function_is_longer_than_60_lines():
    sizes = [
        (node.end_lineno - node.lineno + 1, f"{module}.{node.name}")
        for module, node in functions(MODULES | BENCHMARKS)
    ]
    assert_none([f"{name}: {size}" for size, name in sizes if size > 60])


# --- Traps ----------------------------------------------------------------------------------------------------


def test_each_trap_has_a_definition_and_a_test_that_exists():
    """Code cites T1 to T19, which docs/traps.md defines."""
    entries = re.split(r'<a id="(T\d+)"></a>', (ROOT / "docs" / "traps.md").read_text())
    defined = dict(zip(entries[1::2], entries[2::2], strict=True))
    assert list(defined) == [f"T{number}" for number in range(1, 20)]
    tests = {function.name for _, function in functions(_read("tests/**/test_*.py"))}
    assert_none([name for name, text in defined.items() if not tests & set(re.findall(r"`(test_\w+)`", text))])


def draw() -> str:
    """Return the layers from the top down, each room with the rooms that it imports from."""
    lines, imports = [], room_imports()
    for layer, rooms in LAYERS.items():
        lines.append(f"--- {layer} ".ljust(100, "-"))
        for room in rooms:
            if any(room_of(module) == room for module in MODULES):
                below = sorted(imports[room], key=lambda other: (-HEIGHT[other], other))
                short = [other.removeprefix("captioning.") for other in below]
                lines.append(f"{room.removeprefix('captioning.'):<16} -> {', '.join(short) or 'nothing of ours'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(draw())
