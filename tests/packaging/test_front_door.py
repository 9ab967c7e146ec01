"""What a newcomer meets first names things that exist, and says the same as pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]


def test_paths_of_contributing_exist() -> None:
    names = re.findall(r"`([\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    paths = [name for name in names if "/" in name and not name.startswith("-")]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_make_targets_of_contributing_exist() -> None:
    targets = set(re.findall(r"\bmake ([a-z][\w-]*)", (ROOT / "CONTRIBUTING.md").read_text()))
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"setup", "test", "lint", "docs"}
    assert [t for t in targets if not re.search(rf"^{t}\b.*:", makefile, re.MULTILINE)] == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_citation_agrees_with_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "authors", "title"} <= set(citation)
    assert citation["title"] == project["name"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["references"][0]["url"] == project["urls"]["Paper"]


def old_names() -> set[str]:
    """Every name that the sources keep for one version: the arguments of renamed() and
    warn_renamed()."""
    found: set[str] = set()
    for folder in ("tokenflow_ext", "models", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                    continue
                if call.func.id == "renamed" and isinstance(call.args[1], ast.Dict):
                    found |= {ast.literal_eval(key) for key in call.args[1].keys}
                elif call.func.id == "warn_renamed" and isinstance(call.args[0], ast.Constant):
                    found.add(call.args[0].value.rpartition(".")[2])
    return found


def test_the_changelog_lists_the_names_that_changed() -> None:
    names = old_names()
    assert {"walk", "three_step"} <= names
    deprecated = (ROOT / "CHANGELOG.md").read_text().partition("### Deprecated")[2]
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", deprecated)] == []


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms(form: str) -> None:
    """The rules that GitHub holds forms to."""
    content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert {"name", "description", "body"} <= set(content)
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert fields
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
        assert field["type"] != "dropdown" or field["attributes"]["options"]


def test_pre_commit_runs_the_linters_of_make() -> None:
    """Each hook is a tool of .venv that `make lint` uses too, in the version that it pins."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    makefile, pins = (ROOT / "Makefile").read_text(), (ROOT / "constraints.txt").read_text()
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert all(repo["repo"] == "local" for repo in config["repos"])
    tools = [re.match(r"\.venv/bin/([\w-]+)", hook["entry"])[1] for hook in hooks]
    assert set(tools) == {"ruff", "clang-format", "mypy"}
    for tool in tools:
        assert f"$(BIN)/{tool}" in makefile
        assert re.search(rf"^{tool}==", pins, re.MULTILINE)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_classifiers_name_the_pythons_that_are_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))
    assert f">=3.{min(map(int, named))}" == project["requires-python"]
