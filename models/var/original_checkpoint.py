"""VAR's released weights: a torch file with one state dict.

Its names are those of :meth:`VAR.state_dict`, with one more, a buffer that says nothing new:

    attn_bias_for_masking    [1, 1, L, L], 0 where a place sees another, -inf where it does not
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenflow_ext.models.serialization.config import CheckpointError
from tokenflow_ext.models.serialization.state_dict import listed
from tokenflow_ext.models.text_to_image.sequence import NextScaleSequence

from .config import VarConfig

_MASK = "attn_bias_for_masking"
_HALVES = ("head.weight", "word_embed.weight", "class_emb.weight", "pos_1LC", "lvl_embed.weight")


def without_mask(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the mask, whose infinities are no damage."""
    return {key: value for key, value in state.items() if key != _MASK}


def infer_config(state: Mapping[str, Tensor], scales: Sequence[int], source: str) -> VarConfig:
    """The configuration of released weights, from their names and shapes.

    Args:
        scales: of the image tokenizer. The weights tell their number and the number of places.
        source: what messages call the state dict.

    Raises:
        CheckpointError: no such weights, or ones of other scales.
    """
    if missing := [key for key in (*_HALVES, "blocks.0.ffn.fc1.weight") if key not in state]:
        raise CheckpointError(
            f"{source} is no released VAR: it has no {', '.join(missing)}; its names are "
            f"{listed(state)}"
        )
    for key in (*_HALVES, "blocks.0.ffn.fc1.weight"):
        if state[key].dim() != (3 if key == "pos_1LC" else 2):
            raise CheckpointError(f"{source}: {key} is {tuple(state[key].shape)}")
    width = state["head.weight"].shape[1]
    length, levels = state["pos_1LC"].shape[1], state["lvl_embed.weight"].shape[0]
    if (length, levels) != (sum(side * side for side in scales), len(scales)):
        raise CheckpointError(
            f"{source} has {levels} scales of {length} places together, and the tokenizer's scales "
            f"are {', '.join(map(str, scales))}"
        )
    numbers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    depth = len(numbers)
    lengths = state.get("blocks.0.attn.scale_mul_1H11")
    known = lengths is not None and lengths.dim() == 4
    # Where nothing says it: the released models' heads have 64 channels.
    heads = lengths.shape[1] if lengths is not None and known else max(1, width // 64)
    return VarConfig(
        depth=depth,
        width=width,
        heads=heads,
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        classes=state["class_emb.weight"].shape[0] - 1,
        codebook_size=state["head.weight"].shape[0],
        feature_dim=state["word_embed.weight"].shape[1],
        scales=tuple(scales),
        shared_adaln="shared_ada_lin.1.weight" in state,
        l2_attention=lengths is not None,
    )


def _mask(config: VarConfig) -> Tensor:
    visible = NextScaleSequence(config.scales, 1).visible()
    seen = torch.arange(config.image_tokens) < visible[:, None]
    return torch.zeros(1, 1, *seen.shape).masked_fill(~seen, -math.inf)


def read(state: Mapping[str, Tensor], config: VarConfig, source: str) -> dict[str, Tensor]:
    """The weights without the mask, which is held against the scales.

    Raises:
        CheckpointError: a mask of other scales, or numbers of scales that are not theirs.
    """
    mask = state.get(_MASK)
    if mask is not None and not mask.is_meta and not torch.equal(mask.float(), _mask(config)):
        raise CheckpointError(f"{source}: {_MASK} is not that of the tokenizer's scales")
    weights = without_mask(state)
    numbers = weights.get("lvl_1L")
    if numbers is not None and not numbers.is_meta:
        expected = [i for i, side in enumerate(config.scales) for _ in range(side * side)]
        if numbers.tolist() != [expected]:
            raise CheckpointError(f"{source}: lvl_1L is not that of the tokenizer's scales")
    return weights


def write(state: Mapping[str, Tensor], config: VarConfig) -> dict[str, Tensor]:
    """The released form: with the mask, which the released programs look for."""
    like = state["head.weight"]
    return {**state, _MASK: _mask(config).to(like.device)}
