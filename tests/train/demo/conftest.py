"""What the tests of the page share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenflow_ext.models import VAR, TokenFlowTokenizer, VarConfig


@pytest.fixture(scope="session")
def classes_run(image_tokenizer, tmp_path_factory) -> Path:
    """A saved VAR of three named classes, of random weights."""
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    torch.manual_seed(0)
    shape = VarConfig.for_tokenizer(
        tokenizer, depth=1, width=32, heads=2, classes=3, class_names=("ant", "bee", "cow")
    )
    model = VAR(shape, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.save_pretrained(tmp_path_factory.mktemp("demo") / "var")
