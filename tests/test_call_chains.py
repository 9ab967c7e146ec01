"""The call chains of docs/architecture.md are those of the code."""

from __future__ import annotations

import sys
from pathlib import Path

import call_chains
import pytest
import torchrun

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="needs co_qualname")


def test_the_page_has_the_chains_of_today(tmp_path: Path) -> None:
    """`python tests/call_chains.py` renews them."""
    file = tmp_path / "chains.md"
    torchrun.finish(torchrun.launch(call_chains.__file__, [str(file)]))
    assert file.read_text().strip() == call_chains.on_the_page()


def test_an_end_that_is_not_reached_is_an_error() -> None:
    end = call_chains.End("nowhere", "no_such_function", ".py")
    with pytest.raises(KeyError, match="nowhere"):
        call_chains.chains([end], lambda: None)
