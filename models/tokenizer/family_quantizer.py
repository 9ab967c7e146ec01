"""Any quantizer of the family between a tokenizer's encoders and decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenflow_ext import CodebookUsage, Levels, Projected, Quantizer, QuantizerOutput, Signs, Table
from tokenflow_ext.codes import Code, Entropy
from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.quantizer import MultiScaleQuantizer

if TYPE_CHECKING:
    from .config import TokenizerConfig

#: Codes of a group whose use is counted, at most.
MOST_CODES = 1 << 20


class FamilyQuantizer(Quantizer):
    """:class:`tokenflow_ext.Quantizer` with the outputs of ``MultiScaleQuantizer``.

    Tokens are [B, L(, G)(, depth)]; codes are numbered over all groups where they are counted.

    Args:
        arguments: of :class:`tokenflow_ext.Quantizer`.

    Attributes:
        num_codes: codes of all groups together.
        last_losses: the losses of the last forward pass by name, without gradient.
        tokens_per_scale: places of each scale.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        counted = self.groups if self.index == "own" else self.groups[:1]
        for group in counted:
            if group.size > MOST_CODES:
                raise ValueError(
                    f"groups must have at most 2^20 codes, whose use is counted, got {group}"
                )
        self.codes_per_group = tuple(group.size for group in counted)
        self.num_codes = self.codebook_size = sum(self.codes_per_group)
        self.tokens_per_scale = tuple(self._steps())
        self.last_losses: dict[str, Tensor] = {}

    @property
    def codebooks(self) -> list[nn.Parameter]:
        """The tables that can be set: none of signs, levels and projected tables."""
        if any(not isinstance(group, Table) for group in self.groups):
            return []
        return [
            codebook
            for part in self._parts
            if isinstance(part, MultiScaleQuantizer)
            for codebook in part.codebooks
        ]

    @property
    def usage_ema(self) -> Tensor:
        """Running hits of all codes, [num_codes]."""
        parts = (part.usage_ema for part in self._parts)
        return torch.cat([hits.flatten() for hits in parts if hits is not None])

    def forward(self, h: Tensor) -> QuantizerOutput:  # type: ignore[override]
        """The quantizer's output, all losses but the commitment's in ``vq_loss``; see
        :meth:`tokenflow_ext.Quantizer.forward`."""
        out = super().forward(h)
        losses = dict(out.losses)
        self.last_losses = {name: loss.detach() for name, loss in losses.items()}
        commitment = losses.pop("commitment", h.new_zeros(()))
        others = sum(losses.values(), torch.zeros_like(commitment))
        hits = torch.cat([usage.hits for usage in out.usage if usage is not None])
        return QuantizerOutput(
            out.quantized, out.indices, others, commitment, CodebookUsage.from_hits(hits)
        )

    def code_numbers(self, indices: Tensor) -> Tensor:
        """Token indices as numbers among the codes of all groups."""
        if self.index == "shared":
            return indices
        first = torch.tensor((0, *self.codes_per_group[:-1]), device=indices.device).cumsum(0)
        return indices + first.view(-1, *[1] * (self.depth > 1))

    def rows(self, h: Tensor) -> Tensor:
        """Features [B, D, H, W] as `init_kmeans` and `restart_dead_codes` take them: themselves."""
        return h


def arguments_of(config: TokenizerConfig) -> dict[str, Any]:
    """What a configuration with ``quantizer.kind = "family"`` asks of
    :class:`tokenflow_ext.Quantizer`.

    Raises:
        ConfigError: a branch that is not a whole number of groups.
    """
    quantizer, family = config.quantizer, config.quantizer.family
    entropy = None
    if family.entropy:
        entropy = Entropy(
            family.entropy,
            temperature=family.entropy_temperature,
            gamma=family.entropy_gamma,
            factorized=family.factorized,
        )
    groups = _groups(config)
    return {
        "groups": groups,
        "index": family.index if len(groups) > 1 else "shared",
        "depth": family.depth,
        "scales": quantizer.scales,
        "metric": family.metric,
        "update": quantizer.codebook_update,
        "straight_through": family.straight_through,
        "errors": family.errors,
        "phi": (quantizer.phi, quantizer.phi_shared) if family.convolutions else None,
        "entropy": entropy,
        "beta": quantizer.beta,
        "flips": family.flips,
        "upsampling": family.upsampling,
        "usage_decay": quantizer.usage_decay,
        "scale_drop": quantizer.scale_drop,
    }


def _groups(config: TokenizerConfig) -> tuple[Code, ...]:
    family = config.quantizer.family
    groups: list[Code] = []
    for branch, (name, width) in enumerate(zip(config.branches, config.dims, strict=True)):
        dim = family.group_dim or width
        if width % dim:
            raise ConfigError(
                f"{name}.code_dim must be a multiple of quantizer.family.group_dim, got {width} "
                f"and {dim}"
            )
        groups += [_code(config, dim, branch)] * (width // dim)
    return tuple(groups)


def _code(config: TokenizerConfig, dim: int, branch: int) -> Code:
    quantizer, family = config.quantizer, config.quantizer.family
    if family.code == "signs":
        return Signs(dim, spherical=family.spherical)
    if family.code == "levels":
        if len(family.levels) != dim:
            raise ConfigError(
                f"quantizer.family.levels must hold a number for each of a group's {dim} channels, "
                f"got {list(family.levels)}"
            )
        return Levels(family.levels)
    if family.code == "projected":
        return Projected(quantizer.codebook_size, dim, l2_norm=quantizer.l2_norm)
    weights = quantizer.weights
    weight = 1.0 if weights is None or family.group_dim else weights[branch]
    return Table(quantizer.codebook_size, dim, l2_norm=quantizer.l2_norm, weight=weight)
