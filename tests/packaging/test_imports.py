"""Who imports whom inside the package: no cycle, one direction, and one way to write it."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "tokenflow_ext"
# What torchrun and Python start by their path are in no package while they run.
STARTED_BY_PATH = frozenset(
    f"{PACKAGE}.train.{name}"
    for name in (
        "tokenizer",
        "decoder",
        "text_to_image",
        "understanding",
        "unified",
        "var",
        "cli.__main__",
    )
)
# A folder may import those before it.
ORDER = {
    "models": (
        *("serialization", "towers", "tokenizer", "losses", "text_to_image"),
        *("understanding", "unified", "var"),
    ),
    "train": ("data", "engine", "tasks", "evaluation", "demo", "cli"),
}


class Module(NamedTuple):
    """A source file, and the package whose relative imports it may use."""

    tree: ast.Module
    package: str


def read_modules(root: Path, package: str) -> dict[str, Module]:
    """All modules of the package in the folder `root`, by their names."""
    modules = {}
    pending = [(root / package, package)]
    while pending:
        folder, name = pending.pop()
        for path in folder.iterdir():
            if path.is_dir() and any(path.glob("*.py")):
                pending.append((path, f"{name}.{path.name}"))
            elif path.suffix == ".py":
                module = name if path.stem == "__init__" else f"{name}.{path.stem}"
                modules[module] = Module(ast.parse(path.read_text(encoding="utf-8")), name)
    return modules


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Import statements that run when the module is imported."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If):
            checked = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            yield from at_import(node.orelse if checked else node.body + node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node, *node.handlers):
                yield from at_import(part.body)
            yield from at_import(node.orelse + node.finalbody)


def targets(node: ast.stmt, module: Module, known: dict[str, Module]) -> set[str]:
    """The modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in known}
    assert isinstance(node, ast.ImportFrom)
    base = node.module or ""
    if node.level:
        parts = module.package.split(".")
        base = ".".join([*parts[: len(parts) + 1 - node.level], *filter(None, [base])])
    named = {f"{base}.{alias.name}" for alias in node.names}
    found = named & known.keys()
    return found | ({base} & known.keys() if named - found else set())


def import_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """For each module those that have to be imported before it.

    Importing a module runs the `__init__` of each folder on its way. Those of the folders that
    the importing module lies in have begun already, and it does not wait for them.
    """
    graph: dict[str, set[str]] = {}
    for name, module in modules.items():
        graph[name] = set()
        for node in at_import(module.tree.body):
            for target in targets(node, module, modules):
                parts = target.split(".")
                ways = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
                graph[name] |= {
                    w for w in ways if w == target or not f"{name}.".startswith(w + ".")
                }
    return graph


def spelled_wrongly(
    modules: dict[str, Module], started_by_path: frozenset[str] = frozenset()
) -> list[str]:
    """Imports inside a folder that are not relative, and imports across folders that are."""
    wrong = []
    for name, module in modules.items():
        for node in ast.walk(module.tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            level = getattr(node, "level", 0)
            for target in targets(node, module, modules):
                inside = target.startswith(module.package + ".")
                expected = 1 if inside and name not in started_by_path else 0
                if level != expected:
                    wrong.append(f"{name}, line {node.lineno}: {target}")
    return sorted(wrong)


MODULES = read_modules(ROOT, PACKAGE)


def write(folder: Path, files: dict[str, str]) -> dict[str, Module]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return read_modules(folder, "demo")


def test_the_whole_package_is_read():
    assert {f"{PACKAGE}.quantizer", f"{PACKAGE}.models.tokenizer.model"} <= MODULES.keys()
    assert {f"{PACKAGE}.train.data.crops", f"{PACKAGE}.train.config"} <= MODULES.keys()


def test_no_cycle():
    order = list(graphlib.TopologicalSorter(import_graph(MODULES)).static_order())
    assert sorted(order) == sorted(MODULES)


def test_imports_inside_a_folder_are_relative_and_others_absolute():
    assert spelled_wrongly(MODULES, STARTED_BY_PATH) == []


def test_dependence_goes_one_way():
    """tokenflow_ext itself, then models, then train; in those two as `ORDER` says."""

    def rank(name: str) -> tuple[int, int]:
        half, folder = (*name.split(".")[1:3], "", "")[:2]
        if half not in ORDER:
            return 0, 0
        # Modules at the top have no place: every folder imports the shared ones, and the scripts
        # import every folder.
        place = ORDER[half].index(folder) if folder in ORDER[half] else -1
        return 1 + list(ORDER).index(half), place

    upwards = []
    for name, module in MODULES.items():
        half, place = rank(name)
        for node in ast.walk(module.tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            for target in targets(node, module, MODULES):
                other, there = rank(target)
                if other > half or (other == half and place >= 0 and there > place):
                    upwards.append(f"{name}, line {node.lineno}: {target}")
    assert upwards == []


@pytest.mark.parametrize(
    ("second", "cycle"),
    [
        ("from .a import x", True),
        ("from demo.a import x", True),
        ("try:\n    import demo.a\nexcept ImportError:\n    pass", True),
        ("def f():\n    from .a import x", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x", False),
        ("from .sub.c import y", True),  # by way of the folder's __init__
        ("from . import d", False),
    ],
)
def test_a_cycle_is_seen(tmp_path, second, cycle):
    files = {
        "demo/__init__.py": "from .a import x",
        "demo/a.py": "from . import b\nx = 1",
        "demo/b.py": second,
        "demo/d.py": "",
        "demo/sub/__init__.py": "from demo.a import x",
        "demo/sub/c.py": "y = 1",
    }
    sorter = graphlib.TopologicalSorter(import_graph(write(tmp_path, files)))
    if cycle:
        with pytest.raises(graphlib.CycleError):
            sorter.prepare()
    else:
        sorter.prepare()


def test_a_wrong_spelling_is_seen(tmp_path):
    files = {
        "demo/__init__.py": "from .a import x\nfrom demo.sub.c import y",
        "demo/a.py": "from demo.b import x\ndef f():\n    from . import b",
        "demo/b.py": "import demo.a",
        "demo/sub/__init__.py": "from .c import y",
        "demo/sub/c.py": "from ..a import x\nfrom demo.a import x",
    }
    modules = write(tmp_path, files)
    assert spelled_wrongly(modules) == [
        "demo, line 2: demo.sub.c",
        "demo.a, line 1: demo.b",
        "demo.b, line 1: demo.a",
        "demo.sub.c, line 1: demo.a",
    ]
    assert "demo.a, line 1: demo.b" not in spelled_wrongly(modules, frozenset({"demo.a"}))
