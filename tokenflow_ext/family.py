"""One quantizer for the family: groups x depth x scales x kind of code x metric x update.

`Quantizer` chooses the part that serves each of its groups (`MultiScaleQuantizer`, `VarQuantizer`,
`ProjectedQuantizer`, `IndexBackpropQuantizer`, `ScalarQuantizer`) and gives all of them one
interface. `presets` has the published points of the space by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .codes import BitOrder, Code, Entropy, Levels, Projected, Signs, Table
from .index_backprop import choose
from .ops import Size
from .projected import ProjectedQuantizer
from .quantizer import CodebookUsage, MultiScaleQuantizer, QuantizerOutput
from .scalar_quantizer import ScalarOutput, ScalarQuantizer, steps_up_to
from .soft_entropy import entropy_loss
from .var import VarQuantizer

Part = MultiScaleQuantizer | ScalarQuantizer


class QuantizerResult(NamedTuple):
    """What `Quantizer.forward` returns."""

    quantized: Tensor
    """f^ [B, D, H, W] in the dtype of h, with a gradient to h."""
    indices: Tensor
    """[B, L(, G)(, depth)] int64: G with indices of their own, depth where it is above 1."""
    losses: dict[str, Tensor]
    """Scalars by name, weighted, to be added up: "codebook", "commitment", "entropy"."""
    usage: list[CodebookUsage | None]
    """Of every index: one, or one a group. None where there are too many codes to count."""


class Quantizer(nn.Module):
    """Quantizes feature maps with any of the family's codes.

    Args:
        groups: the codes of consecutive channels of h.
        index: "shared": all groups, tables of one size, have one index (TokenFlow); "own": each has
            one (UniTok). Of no meaning with one group, but for the shape of indices.
        depth: rounds of residual quantization at every scale (RQ-VAE).
        scales: side of each scale's grid, or (height, width), coarse to fine. Features of any size
            are averaged to each and codes upsampled back.
        metric: "l2" or "dot", of tables.
        update: what moves tables: "gradient", "ema" (then there is no codebook loss), or "none".
        straight_through: how a gradient passes: "scales": through every scale's rounding, pooling
            and normalisation, as TokenFlow and UniTok do; "identity": f^ as h itself, as VAR and
            RQ-VAE do; "softmax": through the softmax over all codes, to all of them (IBQ).
        errors: what the losses compare: "scales": each scale's codes with what it searched with;
            "running": the sum so far with the features (VAR, RQ-VAE).
        phi: (share, convolutions) of VAR's convolutions between scales.
        entropy: loss of the choice of a code: of signs, or of tables with one scale and depth 1.
        beta: factor of the commitment loss; with straight_through="softmax" of the codebook's.
        flips: share of signs inverted at random in training.
        upsampling: "bicubic", or "bilinear" for signs and levels.
        usage_decay: decay of running hits, and of "ema".
        scale_drop: in training, the probability of leaving out one scale, never the first.

    Attributes:
        parts: the quantizers that serve the groups, each over consecutive channels.
        bits_per_image: information of all tokens.

    Raises:
        ValueError, TypeError: an argument out of its range, or a combination that means nothing,
            named in the message.
    """

    def __init__(
        self,
        groups: Code | Sequence[Code],
        *,
        index: Literal["shared", "own"] = "shared",
        depth: int = 1,
        scales: Sequence[int | Size] = (16,),
        metric: Literal["l2", "dot"] = "l2",
        update: Literal["gradient", "ema", "none"] = "gradient",
        straight_through: Literal["scales", "identity", "softmax"] = "scales",
        errors: Literal["scales", "running"] = "scales",
        phi: tuple[float, int] | None = None,
        entropy: Entropy | None = None,
        beta: float = 0.25,
        flips: float = 0.0,
        upsampling: Literal["bicubic", "bilinear"] = "bicubic",
        usage_decay: float = 0.99,
        scale_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.groups = (groups,) if isinstance(groups, Code) else tuple(groups)
        if not self.groups or not all(isinstance(group, Code) for group in self.groups):
            raise TypeError(
                f"groups must be one or more of Table, Projected, Signs, Levels, got {groups!r}"
            )
        for name, value, allowed in (
            ("index", index, ("shared", "own")),
            ("metric", metric, ("l2", "dot")),
            ("update", update, ("gradient", "ema", "none")),
            ("straight_through", straight_through, ("scales", "identity", "softmax")),
            ("errors", errors, ("scales", "running")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.depth = int(depth)
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.scales = tuple(ops.as_sizes(scales))
        if not self.scales or min(min(s) for s in self.scales) < 1:
            raise ValueError(f"scales must hold one or more positive sides, got {tuple(scales)}")
        self.index, self.metric, self.update = index, metric, update
        self.straight_through, self.errors, self.entropy = straight_through, errors, entropy
        self.phi, self.beta = phi, float(beta)
        self.dim = sum(group.dim for group in self.groups)
        self._check(flips, upsampling, scale_drop)
        options = {"usage_decay": usage_decay, "scale_drop": scale_drop}
        scalars = {"flips": flips, "upsampling": upsampling, "usage_decay": usage_decay}
        self.parts = nn.ModuleList(self._part(run, options, scalars) for run in self._runs())
        if index == "shared":
            self.bits = self.groups[0].bits
        else:
            self.bits = sum(group.bits for group in self.groups)
        self.num_tokens = sum(height * width for height, width in self.scales)

    @property
    def _parts(self) -> list[Part]:
        return cast(list[Part], list(self.parts))

    @property
    def bits_per_image(self) -> float:
        """Information of the tokens of all scales, in bits."""
        return self.num_tokens * self.depth * self.bits

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Quantizer:
        """A published quantizer by name, see `tokenflow_ext.presets`.

        Args:
            name: such as "unitok".
            changes: arguments of `Quantizer` in the place of the preset's.

        Raises:
            ValueError: an unknown name.
        """
        from . import presets

        return cls(**(presets.preset(name) | changes))

    def _check(self, flips: float, upsampling: str, scale_drop: float) -> None:
        """Refuses combinations that mean nothing, by name."""
        kinds = {type(group) for group in self.groups}
        tables = kinds <= {Table}
        looked_up = kinds <= {Table, Projected}
        several = len(self.scales) > 1
        shared = self.index == "shared" and len(self.groups) > 1

        def refuse(option: str, reason: str) -> None:
            raise ValueError(f"{option} {reason}, got groups {', '.join(map(str, self.groups))}")

        if shared and (len(kinds) > 1 or not looked_up):
            refuse("index='shared'", "needs groups of one kind of tables")
        if shared and len({group.size for group in self.groups}) > 1:
            refuse("index='shared'", "needs tables of one size")
        norms = {group.l2_norm for group in self.groups if isinstance(group, (Table, Projected))}
        if shared and len(norms) > 1:
            refuse("index='shared'", "needs tables that are all l2_norm or none")
        weights = {group.weight for group in self.groups if isinstance(group, Table)}
        if not shared and weights not in (set(), {1.0}):
            refuse("weight", "compares tables that share an index")
        if not looked_up and self.metric != "l2":
            refuse(f"metric={self.metric!r}", "is of tables")
        if not looked_up and scale_drop:
            refuse(f"scale_drop={scale_drop}", "is of tables")
        if not tables and self.update != "gradient":
            refuse(f"update={self.update!r}", "is of tables alone")
        if flips and kinds != {Signs}:
            refuse(f"flips={flips}", "are of signs")
        if upsampling != "bicubic" and looked_up:
            refuse(f"upsampling={upsampling!r}", "is of signs and levels")
        if self.phi is not None and (not tables or shared):
            refuse("phi", "is of tables with indices of their own")
        if self.errors == "running" and (not tables or shared):
            refuse("errors='running'", "is of tables with indices of their own")
        if self.entropy is not None and Levels in kinds:
            refuse("entropy", "is not of levels")
        if self.entropy is not None and looked_up and (several or self.depth > 1 or shared):
            refuse("entropy", "of tables needs one scale, depth 1 and indices of their own")
        if self.straight_through == "softmax":
            one = len(self.groups) == 1 and not several and self.depth == 1
            if not tables or not one or self.metric != "dot" or self.update != "gradient":
                refuse(
                    "straight_through='softmax'",
                    "needs one table, metric='dot', update='gradient', one scale and depth 1",
                )
            if True in norms:
                refuse("straight_through='softmax'", "is of the scores as they are, not l2_norm")
        if self.straight_through == "identity" and not tables:
            refuse("straight_through='identity'", "is of tables")
        if scale_drop and self.depth > 1:
            refuse(f"scale_drop={scale_drop}", "leaves out a scale, and with depth a round")
        if self._is_var:
            self._check_var()

    def _check_var(self) -> None:
        """What VAR's pyramid has one form of."""
        for name, value, only in (
            ("metric", self.metric, "l2"),
            ("straight_through", self.straight_through, "identity"),
            ("errors", self.errors, "running"),
            ("depth", self.depth, 1),
        ):
            if value != only:
                raise ValueError(
                    f"{name} must be {only!r} with VAR's pyramid (phi, or errors='running' over "
                    f"several scales), got {value!r}"
                )
        if self.update == "ema":
            raise ValueError(
                "update must be 'gradient' or 'none' with VAR's pyramid (phi, or errors='running' "
                "over several scales), got 'ema'"
            )

    def _runs(self) -> list[tuple[Code, ...]]:
        """Groups that one part serves in one call."""
        if self.index == "shared":
            return [self.groups]
        runs: list[tuple[Code, ...]] = []
        for group in self.groups:
            alone = self._is_var or isinstance(group, Projected)
            if runs and runs[-1][0] == group and not alone:
                runs[-1] = (*runs[-1], group)
            else:
                runs.append((group,))
        return runs

    @property
    def _is_var(self) -> bool:
        """Whether the running sum must be formed: at one size of scales it is in the errors."""
        return self.phi is not None or (self.errors == "running" and len(set(self.scales)) > 1)

    def _part(
        self, run: tuple[Code, ...], options: dict[str, Any], scalars: dict[str, Any]
    ) -> Part:
        first, dims = run[0], [group.dim for group in run]
        if isinstance(first, (Signs, Levels)):
            if isinstance(first, Signs):
                scalars = scalars | {"entropy": self.entropy}
            return ScalarQuantizer(
                first, len(run), self.scales, depth=self.depth, beta=self.beta, **scalars
            )
        # IBQ's factor is of the codebook's loss.
        beta = 1.0 if self.straight_through == "softmax" else self.beta
        options = options | {"beta": beta, "l2_norm": first.l2_norm}
        if self._is_var:
            share, count = self.phi or (0.0, 1)
            part: MultiScaleQuantizer = VarQuantizer(
                first.size, first.dim, self.scales, phi_ratio=share, phi_shared=count, **options
            )
        else:
            options["index"] = "own" if self.index == "own" else "shared"
            options["metric"] = self.metric
            scales = [size for size in self.scales for _ in range(self.depth)]
            if isinstance(first, Projected):
                part = ProjectedQuantizer(first.size, dims, scales, bias=first.bias, **options)
            else:
                if options["index"] == "shared":
                    options["weights"] = [cast(Table, group).weight for group in run]
                options["codebook_update"] = "ema" if self.update == "ema" else "gradient"
                part = MultiScaleQuantizer(first.size, dims, scales, **options)
        if self.update == "none":
            part.codebooks.requires_grad_(False)
        return part

    def extra_repr(self) -> str:
        return f"{self.bits_per_image:g} bits an image of {self.num_tokens} places"

    # ------------------------------------------------------------------ forward

    def forward(self, h: Tensor) -> QuantizerResult:
        """Quantizes features.

        Args:
            h: [B, D, H, W], float32, float64 (CPU), bfloat16 or float16.

        Raises:
            TypeError, ValueError, RuntimeError: a wrong dtype or shape; the message names the
                argument.
        """
        features = self._split(h)
        if self.errors == "running" and not self._is_var and h.shape[2:] != self.scales[0]:
            raise ValueError(
                f"h must have the size of the scale, {self.scales[0]}, where errors='running', got "
                f"{tuple(h.shape[2:])}"
            )
        outputs = [self._run(part, x) for part, x in zip(self._parts, features, strict=True)]
        losses: dict[str, Tensor] = {}
        for part, output in zip(self._parts, outputs, strict=True):
            # Means over groups: a part counts as often as it has groups.
            share = part.books / sum(other.books for other in self._parts)
            for name, loss in output.losses.items():
                losses[name] = losses.get(name, 0) + share * loss
        return QuantizerResult(
            _joined([output.quantized for output in outputs]),
            self._arrange(_joined([output.indices for output in outputs])),
            losses,
            [usage for output in outputs for usage in output.usage],
        )

    def _split(self, h: Tensor) -> tuple[Tensor, ...]:
        """Each part's channels.

        Raises:
            ValueError: h is not [B, D, H, W].
        """
        if h.dim() != 4 or h.shape[1] != self.dim or h.numel() == 0:
            raise ValueError(
                f"h must have shape [B, {self.dim}, H, W] with no side of 0, got {tuple(h.shape)}"
            )
        if len(self.parts) == 1:
            return (h,)  # a split's gradient is a copy
        return h.split([part.dim for part in self._parts], dim=1)

    def _run(self, part: Part, h: Tensor) -> QuantizerResult:
        """A part's output, indices [B, G, L]."""
        output: QuantizerOutput | ScalarOutput = part(h)
        losses = {"commitment": output.commitment_loss}
        quantized, indices = output.quantized, output.indices
        if isinstance(output, ScalarOutput):
            if self.entropy is not None:
                losses["entropy"] = output.entropy_loss
            usage = _usage_by_group(output.usage, part.books)
            return QuantizerResult(quantized, indices, losses, usage)
        assert isinstance(part, MultiScaleQuantizer)
        if self.update == "gradient":
            losses["codebook"] = output.vq_loss
        usage = _usage_by_group(output.usage, part.books)
        if self.straight_through == "softmax":
            quantized, losses = self._index_backprop(part, h, indices, losses)
        else:
            if self.straight_through == "identity" and not isinstance(part, VarQuantizer):
                quantized = quantized.detach() + (h - h.detach())  # its value, to the last bit
            if self.entropy is not None and self.training:
                losses["entropy"] = self._table_entropy(part, h)
        return QuantizerResult(
            quantized, indices if indices.dim() == 3 else indices.unsqueeze(1), losses, usage
        )

    def _index_backprop(
        self, part: MultiScaleQuantizer, h: Tensor, indices: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """IBQ's quantized features and losses (arXiv 2412.02692, section 3.2)."""
        rows, codes = _rows(part, h)
        entropy = self.entropy if self.training else None
        found = choose(
            rows,
            codes,
            indices.flatten(),
            temperature=None if entropy is None else entropy.temperature,
            eps=1e-5 if entropy is None else entropy.eps,
        )
        if entropy is not None:
            choice = found.sample_entropy - entropy.gamma * found.codebook_entropy
            losses["entropy"] = entropy.weight * choice
        # Of three squares, the first moves h and all codes; the others h, and the chosen codes.
        losses["straight_through"] = F.mse_loss(found.quantized, rows)
        losses["codebook"] = self.beta * losses["codebook"]
        height, width = part.scales[0]
        maps = found.quantized.unflatten(0, (len(h), height * width)).mT
        maps = maps.unflatten(2, (height, width)).to(h.dtype)
        if maps.shape != h.shape:
            maps = F.interpolate(maps, h.shape[2:], mode="bicubic", align_corners=False)
        return maps, losses

    def _table_entropy(self, part: MultiScaleQuantizer, h: Tensor) -> Tensor:
        entropy = cast(Entropy, self.entropy)
        rows, codes = _rows(part, h)
        width = rows.shape[1] // part.books
        tables = codes.unbind() if codes.dim() == 3 else (codes,)
        parts = [
            entropy_loss(
                ops.normalize_groups(group, (width,), part.l2_norm),
                ops.normalize_groups(table, (width,), part.l2_norm),
                temperature=entropy.temperature,
                gamma=entropy.gamma,
                eps=entropy.eps,
            )
            for group, table in zip(rows.split(width, dim=1), tables, strict=True)
        ]
        return entropy.weight * torch.stack(parts).mean()

    # ------------------------------------------------------------------ tokens

    def _steps(self) -> list[int]:
        """Places of each scale."""
        return [height * width for height, width in self.scales]

    def _arrange(self, tokens: Tensor) -> Tensor:
        """[B, L(, G)(, depth)] of [B, G, depth * L], where a scale's rounds follow each other."""
        if self.depth == 1:
            joined = tokens.transpose(1, 2)
        else:
            parts = tokens.split([self.depth * count for count in self._steps()], dim=2)
            joined = torch.cat([part.unflatten(2, (self.depth, -1)) for part in parts], dim=3)
            joined = joined.permute(0, 3, 1, 2)  # [B, L, G, depth]
        return joined if self.index == "own" else joined.squeeze(2)

    def _tokens(self, indices: Tensor) -> list[Tensor]:
        """Each part's tokens [B, G, depth * L], the inverse of `_arrange`."""
        count = len(self.groups) if self.index == "own" else 1
        expected: tuple[int, ...] = (self.num_tokens,)
        expected += (count,) * (self.index == "own") + (self.depth,) * (self.depth > 1)
        if indices.shape[1:] != expected or len(indices) == 0:
            shown = ", ".join(map(str, ("B", *expected)))
            raise ValueError(
                f"indices must have shape [{shown}], B > 0, got {tuple(indices.shape)}"
            )
        tokens = indices.reshape(len(indices), self.num_tokens, count, self.depth)
        tokens = tokens.permute(0, 2, 3, 1)
        parts = [part.flatten(2) for part in tokens.split(self._steps(), dim=3)]
        joined = torch.cat(parts, dim=2)
        return list(joined.split([part.books for part in self._parts], dim=1))

    @staticmethod
    def _for(part: Part, tokens: Tensor) -> Tensor:
        """Tokens [B, G, L] as a part takes them."""
        own = isinstance(part, ScalarQuantizer) or part.has_own_indices
        return tokens if own else tokens.squeeze(1)

    @torch.no_grad()
    def encode(self, h: Tensor) -> Tensor:
        """Token indices [B, L(, G)(, depth)] int64 of features [B, D, H, W].

        Raises:
            As `forward`.
        """
        found = [part.encode(x) for part, x in zip(self._parts, self._split(h), strict=True)]
        return self._arrange(
            torch.cat([part if part.dim() == 3 else part.unsqueeze(1) for part in found], dim=1)
        )

    @torch.no_grad()
    def decode(
        self,
        indices: Tensor,
        upto: int | None = None,
        size: Size | None = None,
        *,
        rounds: int | None = None,
    ) -> Tensor:
        """`f^ [B, D, *size]` of token indices.

        Args:
            indices: [B, L(, G)(, depth)] of all scales.
            upto: how many scales to sum; all by default.
            size: (height, width) of the result; the last scale's grid by default.
            rounds: how many rounds of the last of these scales to sum; all by default.

        Raises:
            TypeError, ValueError, RuntimeError: a wrong dtype or shape, `upto`, `rounds` or an
                index out of range.
        """
        steps = steps_up_to(len(self.scales), self.depth, upto, rounds)
        maps = []
        for part, tokens in zip(self._parts, self._tokens(indices), strict=True):
            own = self._for(part, tokens)
            if isinstance(part, MultiScaleQuantizer):  # its scales are all rounds
                maps.append(part.decode(own, steps, size))
            else:
                maps.append(part.decode(own, upto, size, rounds=rounds))
        return torch.cat(maps, dim=1)

    @torch.no_grad()
    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes [B, L(, depth), D] of token indices, as they stand before they are upsampled."""
        parts = [
            part.codes(self._for(part, tokens))
            for part, tokens in zip(self._parts, self._tokens(indices), strict=True)
        ]
        codes = torch.cat(parts, dim=-1)  # [B, depth * L, D], a scale's rounds one by one
        if self.depth == 1:
            return codes
        steps = [self.depth * count for count in self._steps()]
        scales = [part.unflatten(1, (self.depth, -1)) for part in codes.split(steps, dim=1)]
        return torch.cat(scales, dim=2).transpose(1, 2)

    @torch.no_grad()
    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Token indices of codes [B, L(, depth), D], the inverse of `indices_to_codes`: of other
        rows, those of the nearest codes.

        Raises:
            ValueError: another shape.
        """
        expected = (self.num_tokens, *((self.depth,) * (self.depth > 1)), self.dim)
        if codes.dim() != 1 + len(expected) or codes.shape[1:] != expected or len(codes) == 0:
            shown = ", ".join(map(str, ("B", *expected)))
            raise ValueError(f"codes must have shape [{shown}], B > 0, got {tuple(codes.shape)}")
        rows = codes.reshape(len(codes), self.num_tokens, self.depth, self.dim).transpose(1, 2)
        found = []
        for part, values in zip(
            self._parts, rows.split([part.dim for part in self._parts], dim=-1), strict=True
        ):
            values = torch.cat(
                [scale.flatten(1, 2) for scale in values.split(self._steps(), dim=2)], dim=1
            )
            found.append(part.nearest(values))
        return self._arrange(torch.cat(found, dim=1))

    def indices_to_bits(self, indices: Tensor, order: BitOrder) -> Tensor:
        """Bits [..., D] bool of token indices [..., (depth)] of signs, by channel.

        Args:
            indices: as `encode` returns them; with several groups their bits follow each other.
            order: which channel the lowest bit stands for: "little": the first (Open-MAGVIT2),
                "big": the last (Infinity, vector-quantize-pytorch). Said by name, so that tokens of
                another library can be read; `encode` writes the order of `Signs`.

        Raises:
            ValueError: groups that are not signs.
        """
        group = self._signs()
        places = torch.arange(group.dim, device=indices.device)
        if order == "big":
            places = places.flip(0)
        bits = (indices.unsqueeze(-1) >> places & 1).bool()
        return bits if self.index == "shared" else self._join_groups(bits)

    def bits_to_indices(self, bits: Tensor, order: BitOrder) -> Tensor:
        """The inverse of `indices_to_bits`."""
        group = self._signs()
        places = 1 << torch.arange(group.dim, device=bits.device)
        if order == "big":
            places = places.flip(0)
        if self.index == "own":
            parts = bits.unflatten(-1, (len(self.groups), group.dim))
            bits = parts if self.depth == 1 else parts.transpose(-2, -3)
        return (bits.long() * places).sum(-1)

    def _join_groups(self, bits: Tensor) -> Tensor:
        """[B, L(, depth), G * D] of [B, L, G(, depth), D]."""
        return bits.flatten(2) if self.depth == 1 else bits.transpose(2, 3).flatten(3)

    def _signs(self) -> Signs:
        first = self.groups[0]
        if not isinstance(first, Signs) or any(group != first for group in self.groups):
            groups = ", ".join(map(str, self.groups))
            raise ValueError(f"only signs, alike in all groups, have bits, got {groups}")
        return first

    @torch.no_grad()
    def next_scale_inputs(self, indices: Tensor) -> Tensor:
        """Inputs of scales 2 to S for teacher forcing, [B, L - h_1 * w_1, D].

        Each part's pyramid says how the sum so far comes to a scale: TokenFlow's carries it from
        scale to scale; VAR's, and that of signs and levels, averages the sum at the last size.

        Args:
            indices: tokens of all scales.
        """
        parts = []
        for part, tokens in zip(self._parts, self._tokens(indices), strict=True):
            own = part.next_scale_inputs(self._for(part, tokens))
            if isinstance(part, MultiScaleQuantizer) and self.depth > 1:
                own = self._first_rounds(own)
            parts.append(own)
        return torch.cat(parts, dim=-1)

    def _first_rounds(self, inputs: Tensor) -> Tensor:
        """Of the inputs of all rounds but the very first, those of each scale's first round."""
        steps = [count for count in self._steps() for _ in range(self.depth)]
        rounds = inputs.split(steps[1:], dim=1)
        firsts = rounds[self.depth - 1 :: self.depth]
        return torch.cat(firsts, dim=1) if firsts else inputs[:, :0]

    # ------------------------------------------------------------------ codebook care

    @torch.no_grad()
    def init_kmeans(self, h: Tensor, iterations: int = 10) -> None:
        """Sets tables to k-means centres of what they search with for features [B, D, H, W].

        Args:
            h: as for `forward`.
            iterations: how many assignments and means.

        Raises:
            ValueError: groups that have no tables to set.
        """
        for part, features in self._tables_of(h):
            part.init_kmeans(part.rows(features), iterations)

    @torch.no_grad()
    def restart_dead_codes(self, h: Tensor, threshold: float = 0.05) -> int:
        """Moves codes that are hardly used to what is searched with for features [B, D, H, W].

        Args:
            h: as for `forward`.
            threshold: a code is dead where its running hits are below this share of the mean.

        Returns:
            How many codes were moved.

        Raises:
            ValueError: groups that have no tables to set.
        """
        return sum(
            part.restart_dead_codes(part.rows(features), threshold)
            for part, features in self._tables_of(h)
        )

    def _tables_of(self, h: Tensor) -> list[tuple[MultiScaleQuantizer, Tensor]]:
        if any(not isinstance(group, Table) for group in self.groups):
            raise ValueError(
                f"only tables can be set, got groups {', '.join(map(str, self.groups))}"
            )
        parts = cast(list[MultiScaleQuantizer], self._parts)
        return list(zip(parts, self._split(h), strict=True))

    def usage_window(self, reset: bool = True) -> list[CodebookUsage | None]:
        """Usage by group over the training steps since the last reset (all processes)."""
        return [
            usage
            for part in self._parts
            for usage in _usage_by_group(part.usage_window(reset), part.books)
        ]


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts along dimension 1; a single one as it is, not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _rows(part: MultiScaleQuantizer, h: Tensor) -> tuple[Tensor, Tensor]:
    """What a single scale searches with, [B * L, D], differentiable, and the codes."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    pooled = F.interpolate(h.to(dtype), part.scales[0], mode="area")
    return pooled.flatten(2).mT.flatten(0, 1), part.joint_codebook(dtype)


def _usage_by_group(usage: CodebookUsage | None, groups: int) -> list[CodebookUsage | None]:
    """One a group of the usage of all."""
    if usage is None or usage.hits.dim() == 1:
        return [usage] * (groups if usage is None else 1)
    return [CodebookUsage(*(part[group] for part in usage)) for group in range(groups)]
