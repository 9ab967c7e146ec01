"""Stand-ins beside vector-quantize-pytorch's classes of the same name."""

from __future__ import annotations

import torch
import vector_quantize_pytorch as original

from tokenflow_ext import compat


def pair(name: str, options: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs with one state."""
    torch.manual_seed(0)
    theirs = getattr(original, name)(**options)
    ours = getattr(compat, name)(**options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def same_seed(name: str, options: dict) -> None:
    """Asserts that the same seed gives both the same state."""
    states = []
    for library in (original, compat):
        torch.manual_seed(3)
        states.append(getattr(library, name)(**options).state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
