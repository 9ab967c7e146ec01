"""The sets of versions agree with pyproject.toml and with each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]
SETS = ("constraints-oldest.txt", "constraints.txt", "constraints-newest.txt")
# gradio asks for pillow < 13, and the newest set is there to try pillow's newest.
NOT_IN_NEWEST = {"gradio", "playwright"}

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    parts = [int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def pins(name: str) -> dict[str, str]:
    """Package -> version of a constraints file, of which every line is `name==version`."""
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    found = {canonical(package): version for package, version in pairs}
    assert len(found) == len(pairs), "a package is named twice"
    return found


def requirements() -> dict[str, tuple[str, str]]:
    """Package -> (">=" or "==", version) of everything that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found: dict[str, tuple[str, str]] = {}
    for line in (line for lines in lists for line in lines):
        if line.startswith("tokenflow_ext["):
            continue
        match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(>=|==)([\w.]+)", line)
        assert match, f"{line!r} has no lower bound"
        assert found.setdefault(canonical(match[1]), (match[2], match[3])) == (match[2], match[3])
    return found


def test_the_oldest_set_is_the_bounds() -> None:
    oldest = pins(SETS[0])
    for package, (_, version) in requirements().items():
        assert numbers(oldest[package]) == numbers(version), package


@pytest.mark.parametrize("name", SETS[1:])
def test_other_sets_are_within_the_bounds(name: str) -> None:
    found = pins(name)
    for package, (kind, version) in requirements().items():
        if name == SETS[2] and package in NOT_IN_NEWEST:
            assert package not in found
            continue
        if kind == "==":
            assert numbers(found[package]) == numbers(version), package
        else:
            assert numbers(found[package]) >= numbers(version), package


@pytest.mark.parametrize("name", SETS)
def test_a_set_holds_no_part_of_torch(name: str) -> None:
    """A build of torch asks for its own CUDA packages; pinned, another build could not be had."""
    asked = set(requirements())
    parts = {p for p in pins(name) if p.startswith(("nvidia-", "cuda-", "triton"))}
    assert parts <= asked
    assert "+" not in (ROOT / name).read_text()


def test_continuous_integration_tries_each_set_with_the_default_torch() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "oldest newest" in script
    assert "SAME_TORCH=1" in script
