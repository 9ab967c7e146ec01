"""What the README and the guides show works: snippets run, commands and links name what exists."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from tokenflow_ext.models.serialization.config import to_plain
from tokenflow_ext.train import config
from tokenflow_ext.train.cli import entry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [
    page
    for page in PAGES
    if "```python\n" in page.read_text() and page.name != "installation.md"  # a session, shown
]


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    """In order, in one namespace a page."""
    namespace: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert snippets
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"{page.name} snippet {number}", "exec"), namespace)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def shown_commands(page: Path) -> list[list[str]]:
    """The words of every command of ours in a page's plain blocks, without comments."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = (
        "\n".join(block for language, block in fenced if not language)
        .replace("\\\n", " ")
        .splitlines()
    )
    ours = re.compile(r"(make|tokenflow|python|pytest|torchrun) ")
    return [shlex.split(line, comments=True) for line in lines if ours.match(line)]


def options_of(command: str, capsys: pytest.CaptureFixture) -> set[str]:
    """The options that `tokenflow COMMAND --help` lists."""
    with pytest.raises(SystemExit) as end:
        entry.main([command, "--help"])
    assert end.value.code == 0, f"tokenflow has no command {command}"
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


def keys(*kinds: type) -> set[str]:
    """The dotted keys of configurations, groups of keys included."""
    found: set[str] = set()
    for kind in kinds:
        values = to_plain(kind())
        found |= set(config.leaves(values)) | set(values)
    return found


def test_commands_name_what_exists(capsys: pytest.CaptureFixture) -> None:
    makefile = (ROOT / "Makefile").read_text()
    known = keys(
        config.TrainConfig, config.DecoderConfig, config.TextConfig, config.UnderstandingConfig
    )
    options: dict[str, set[str]] = {}
    seen: dict[str, int] = {}
    for page in PAGES:
        for program, *words in shown_commands(page):
            said = f"{page.name}: {program} {' '.join(words)}"
            if program == "make":
                assert re.search(rf"^(.* )?{words[0]}\b.*:", makefile, re.MULTILINE), said
            elif program == "tokenflow":
                if words[0] not in options:
                    options[words[0]] = options_of(words[0], capsys)
                given = {word for word in words if word.startswith("--")}
                assert given <= options[words[0]] | {"--help"}, said
            elif program in ("python", "pytest", "torchrun"):
                for word in words:
                    if re.fullmatch(r"[\w/-]+\.(py|yaml)", word):
                        assert (ROOT / word).exists(), said
                if "-m" in words:
                    module = words[words.index("-m") + 1]
                    source = ROOT / module.replace(".", "/")
                    assert source.with_suffix(".py").exists() or source.is_dir(), said
            seen[program] = seen.get(program, 0) + 1
            if program in ("torchrun", "tokenflow"):
                settings = [re.match(r"([a-z]\w*(\.\w+)*)=", word) for word in words]
                assert {m[1] for m in settings if m} <= known, said
    assert min(seen.get(program, 0) for program in ("make", "tokenflow", "torchrun")) > 5, seen


def test_settings_in_the_guides_are_known() -> None:
    """`key=value` in the guides' tables is a key of a configuration."""
    known = keys(
        config.TrainConfig, config.DecoderConfig, config.TextConfig, config.UnderstandingConfig
    )
    fields = {field.name for field in dataclasses.fields(config.TrainConfig)}
    for name in ("training", "text_to_image", "understanding"):
        text = (ROOT / f"docs/guides/{name}.md").read_text()
        rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
        named = set(re.findall(r"(?<![\w.-])([a-z]\w*(?:\.\w+)+)(?==)", rows))
        assert named, name
        assert {key.split(".")[0] for key in named} & fields
        assert named <= known, name
