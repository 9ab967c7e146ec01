"""The notes of a release: `python -m tools.release v0.1.0`, from CHANGELOG.md.

Fails where the tag, the version in pyproject.toml and the changelog's newest heading do not agree.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
_HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.MULTILINE)
# semver.org's, without build metadata, which is a wheel's here.
_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?")


def version(root: Path = ROOT) -> str:
    """The package's version, from pyproject.toml.

    Raises:
        SystemExit: it is no semantic version.
    """
    found = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    if not _VERSION.fullmatch(found):
        raise SystemExit(f"pyproject.toml: {found} is no semantic version")
    return found


def sections(changelog: str) -> dict[str, tuple[str | None, str]]:
    """Name -> (date, text) of each section, the newest first."""
    headings = list(_HEADING.finditer(changelog))
    ends = [heading.start() for heading in headings[1:]] + [len(changelog)]
    return {
        heading["name"]: (heading["date"], changelog[heading.end() : end].strip())
        for heading, end in zip(headings, ends, strict=True)
    }


def notes(tag: str, root: Path = ROOT) -> str:
    """What is new in the release of a tag.

    Raises:
        SystemExit: tag, version and changelog do not agree.
    """
    wanted = version(root)
    if tag != f"v{wanted}":
        raise SystemExit(f"the tag is {tag}, and pyproject.toml has version {wanted}")
    found = sections((root / "CHANGELOG.md").read_text())
    date, text = found.get(wanted, (None, ""))
    if date is None or not text:
        raise SystemExit(f"CHANGELOG.md has no section '## [{wanted}] - YYYY-MM-DD'")
    newest = next(name for name in found if name != "Unreleased")
    if newest != wanted:
        raise SystemExit(f"CHANGELOG.md has {newest} above {wanted}")
    if found.get("Unreleased", (None, ""))[1]:
        raise SystemExit("CHANGELOG.md has changes under [Unreleased]: are they of this release?")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words = sys.argv[1:] if argv is None else list(argv)
    if len(words) != 1:
        raise SystemExit("usage: python -m tools.release TAG")
    print(notes(words[0]))


if __name__ == "__main__":
    main()
