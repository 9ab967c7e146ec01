"""Which codes each index of a tokenizer has."""

from __future__ import annotations

from tokenflow_ext import MultiScaleQuantizer
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.tokenizer.family_quantizer import FamilyQuantizer
from tokenflow_ext.scalar_quantizer import ScalarQuantizer

from .codes import Codes, TableCodes
from .digits import DigitCodes


def group_names(tokenizer: TokenFlowTokenizer) -> list[str]:
    """Names of the groups that have an index each: their branch, and which of its groups."""
    config = tokenizer.config
    names: list[str] = []
    for branch, width in zip(config.branches, config.dims, strict=True):
        count = width // (config.quantizer.family.group_dim or width)
        names += [f"{branch} {at + 1}" for at in range(count)] if count > 1 else [branch]
    return names


def codes_of(tokenizer: TokenFlowTokenizer) -> list[Codes]:
    """The codes of each index of a tokenizer, in the order of its groups."""
    quantizer = tokenizer.quantizer
    if not isinstance(quantizer, FamilyQuantizer):
        return [TableCodes(quantizer)]
    names = group_names(tokenizer) if quantizer.index == "own" else [""]
    found: list[Codes] = []
    start = 0
    for part in quantizer.parts:
        assert isinstance(part, (MultiScaleQuantizer, ScalarQuantizer))
        for book in range(part.books):
            columns = slice(start, start := start + part.dim // part.books)
            name = names[len(found)]
            if isinstance(part, ScalarQuantizer):
                found.append(DigitCodes.of(part, columns, name))
            else:
                found.append(TableCodes(part, book, columns, name))
    return found
