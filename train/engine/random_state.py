"""The random number generators of a run: seeds, states for a checkpoint, models without draws."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from tokenflow_ext.models.serialization.state_dict import no_random_init

from .distributed import Processes


def seed_generators(seed: int, stream: int) -> None:
    """Seed torch, NumPy and Python.

    Args:
        seed: of the run.
        stream: 0 while models are built, alike on every process; 1 + rank from then on.
    """
    words = np.random.SeedSequence([seed, stream]).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - for code that draws from it
    random.seed(int(words[1]))


def generator_states(group: Processes) -> dict[str, Any]:
    """The states of this process's generators, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }
    if group.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(group.device)
    return states


def restore_generators(states: list[dict[str, Any]], group: Processes) -> None:
    """Take up :func:`generator_states` of as many processes as there are now; of another number
    none is taken up, and the generators go on from their seeds."""
    if len(states) != group.world:
        return
    mine = states[group.rank]
    torch.set_rng_state(mine["torch"])
    kind, keys, *rest = mine["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = mine["python"]
    random.setstate((version, tuple(numbers), gauss))
    if group.device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], group.device)


def undrawn(resuming: bool) -> AbstractContextManager[Any]:
    """Where a model is built: with random weights, or with zeros where ``resuming``, since the
    checkpoint has all of them."""
    return no_random_init() if resuming else nullcontext()
