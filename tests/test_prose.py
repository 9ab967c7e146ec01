"""The documentation's prose stays plain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/guides").glob("*.md")]
)


def prose(text: str) -> str:
    """Markdown without code, comments and link targets."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ {4,}\S.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_prose_leaves_code_out() -> None:
    page = "One; two. `a; b` [x](y;z)\n```\nc; d.\n```\n    e; f.\n<!-- g; -->\n"
    assert prose(page).split() == ["One;", "two.", "code", "[x]"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_few_semicolons(page: Path) -> None:
    """At most three in a hundred sentences, a table's cell counting as one; one is always free."""
    text = prose(page.read_text())
    sentences = len(re.findall(r"[.!?:](?=\s|$)|\|", text))
    assert text.count(";") <= max(1, 0.03 * sentences), page.name
