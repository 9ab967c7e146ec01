"""The published wheel, releases, and the workflow files that make them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

if sys.version_info < (3, 11):
    pytest.skip("needs tomllib", allow_module_level=True)

import build_wheel as wheel
import release
import tomllib
from kernel_build import BuildError, python_facts

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps() -> list[tuple[str, str]]:
    """(workflow, command) of every step that runs a shell."""
    found = []
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text())["jobs"]
        for job in jobs.values():
            lines = [s["run"] for s in job.get("steps", []) if "run" in s]
            found += [(path.name, line) for text in lines for line in text.strip().splitlines()]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_whole(path):
    """What each must have: a trigger (YAML reads "on" as true), few rights, jobs that end."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True]
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file(), name
            continue
        assert job["runs-on"]
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.search(r"@(v\d+|release/v\d+)$", step.get("uses", "x@v1"))
        assert not [key for key in re.findall(r"matrix\.(\w+)", str(job)) if key not in keys(job)]


def keys(job: dict) -> set[str]:
    """The names that a job's matrix gives."""
    matrix = job["strategy"]["matrix"]
    return {*matrix, *(key for row in matrix.get("include", []) for key in row)}


def test_workflows_call_what_there_is():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = steps()
    made = {
        (name, match[1]) for name, line in called for match in re.finditer(r"make ([\w-]+)", line)
    }
    assert made
    assert {target for _, target in made} <= targets
    modules = {match[1] for _, line in called for match in re.finditer(r"-m (tools[\w.]*)", line)}
    assert modules == {"tools.build_wheel", "tools.release"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    tested = re.findall(r"{project}/(\S+)", " ".join(settings["test-command"]))
    assert tested == wheel.TESTS
    pythons = settings["environment"]["TOKENFLOW_PYTHONS"].split(":")
    built = [settings["build"][:5], *(python.split("/")[3][:5] for python in pythons)]
    assert sorted(built) == [f"cp{version.replace('.', '')}" for version in wheel.VERSIONS]
    for _, line in called:
        for file in re.findall(r"(?:^|\s)((?:tests|\.ci)/[\w./]+)", line):
            assert (ROOT / file).exists(), file


# -- the wheel ------------------------------------------------------------------------------------


def test_every_python_that_is_found_has_headers():
    found = wheel.find_pythons()
    assert found["{}.{}".format(*sys.version_info)] == sys.executable
    for python in found.values():
        include, suffix = python_facts(python)
        assert (Path(include) / "Python.h").is_file()
        assert suffix.endswith(".so")


@pytest.mark.parametrize("python", ["/bin/false", "/bin/true"])
def test_a_python_that_is_none(python):
    with pytest.raises(BuildError, match=f"TOKENFLOW_PYTHONS names {python}"):
        python_facts(python)


def test_an_earlier_wheel_is_replaced_and_nothing_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr("tokenflow_ext/__init__.py", "new")
    out = tmp_path / "dist"
    assert (
        wheel.put(tmp_path / "made.whl", out).read_bytes() == (tmp_path / "made.whl").read_bytes()
    )
    wheel.put(tmp_path / "made.whl", out)
    (out / "made.whl").write_bytes(b"somebody's")
    with pytest.raises(SystemExit, match="no wheel of this package"):
        wheel.put(tmp_path / "made.whl", out)
    assert (out / "made.whl").read_bytes() == b"somebody's"


def test_files_of_ours_are_known(tmp_path):
    (tmp_path / "text.whl").write_bytes(b"no archive")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with zipfile.ZipFile(tmp_path / "ours.whl", "w") as archive:
        archive.writestr("tokenflow_ext/__init__.py", "")
    assert [wheel.ours(tmp_path / f"{x}.whl") for x in ("text", "other", "ours")] == [0, 0, 1]


@pytest.mark.parametrize(
    "name",
    [
        "tokenflow_ext-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl",
        "tokenflow_ext-0.1.0-py3-none-linux_x86_64.whl",
    ],
)
def test_a_wheel_of_one_python_or_one_machine_is_refused(tmp_path, name):
    with pytest.raises(SystemExit, match="has not the tags"):
        wheel.check(tmp_path / name, tmp_path, {})


@pytest.mark.parametrize(("local", "added"), [("", ""), ("cu130", "+cu130")])
def test_the_local_version_is_in_the_metadata(tmp_path, local, added):
    """Read without building anything, as pip does first."""
    environment = os.environ | {"TOKENFLOW_LOCAL_VERSION": local}
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    [metadata] = tmp_path.glob("*.dist-info/METADATA")
    assert f"\nVersion: {release.version()}{added}\n" in metadata.read_text()


# -- releases -------------------------------------------------------------------------------------


def test_the_changelog_is_of_this_version():
    """Released versions are semantic and go down; what is not released yet says its number."""
    found = release.sections((ROOT / "CHANGELOG.md").read_text())
    released = [name for name in found if name != "Unreleased"]
    assert all(release._VERSION.fullmatch(name) for name in released)
    if "Unreleased" in found and found["Unreleased"][1]:
        assert f"This will be {release.version()}" in found["Unreleased"][1]
        assert release.version() not in released
    else:
        assert released[0] == release.version()


@pytest.fixture
def project(tmp_path):
    """A project of version 1.2.3 and a changelog."""

    def make(changelog: str, version: str = "1.2.3") -> Path:
        (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}")
        return tmp_path

    return make


def test_notes_are_the_section(project):
    older = "## [1.2.2] - 2026-01-01\n\n- Old.\n"
    root = project(f"## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n- New.\n\n{older}")
    assert release.notes("v1.2.3", root) == "- New."


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "message"),
    [
        ("v1.2.4", "1.2.3", "## [1.2.3] - 2026-01-02\n\n- New.\n", "the tag is v1.2.4"),
        ("1.2.3", "1.2.3", "## [1.2.3] - 2026-01-02\n\n- New.\n", "the tag is 1.2.3"),
        ("v1.2", "1.2", "## [1.2] - 2026-01-02\n\n- New.\n", "no semantic version"),
        ("v1.2.3", "1.2.3", "## [1.2.3]\n\n- New.\n", "no section"),
        ("v1.2.3", "1.2.3", "## [1.2.3] - 2026-01-02\n", "no section"),
        (
            "v1.2.3",
            "1.2.3",
            "## [Unreleased]\n\n- More.\n\n## [1.2.3] - 2026-01-02\n\n- New.\n",
            "Unreleased",
        ),
        (
            "v1.2.3",
            "1.2.3",
            "## [1.3.0] - 2026-01-02\n\n- a\n\n## [1.2.3] - 2026-01-02\n\n- b\n",
            "above",
        ),
    ],
)
def test_a_release_that_does_not_agree(project, tag, version, changelog, message):
    root = project(changelog, version)
    with pytest.raises(SystemExit, match=message):
        release.notes(tag, root)
