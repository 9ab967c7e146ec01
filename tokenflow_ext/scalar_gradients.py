"""Gradients and fake kernels of the operators of scalar quantization (see `scalar`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops import Size, check_devices, num_tokens, with_gradient

StandIn = Literal["same", "unit", "tanh", "clamp"]
#: By the number that the operators know each by.
STAND_INS: tuple[StandIn, ...] = ("same", "unit", "tanh", "clamp")


class Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.tokenflow_ext.scalar_quantize(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        h, thresholds, values, curves, flips, sizes, rounds, bilinear = inputs[:8]
        places, stand_in, slopes, ctx.errors, _ = inputs[8:]
        ctx.options = (sizes, *h.shape[2:], rounds, bilinear, len(places), stand_in, slopes)
        ctx.save_for_backward(output[2], thresholds, values, curves, flips)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        quantized: Tensor | None,
        _indices: None,
        by_rows: Tensor | None,
        error: Tensor | None,
        entropy: Tensor | None,
        chance: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        rows, *tables = ctx.saved_tensors
        sizes, *_, slopes = ctx.options
        scales = len(sizes) // 2
        if slopes:
            entropy = rows.new_zeros(scales) if entropy is None else entropy
            chance = rows.new_zeros(scales, rows.shape[2]) if chance is None else chance
        else:
            entropy = chance = None
        if not ctx.errors:
            error = None
        grads = (quantized, by_rows, error, entropy, chance)
        grad = with_gradient(QuantizeGradient)(rows, *tables, *grads, *ctx.options)
        return grad, *[None] * 12


class QuantizeGradient(torch.autograd.Function):
    """The gradient of the loop, itself differentiable as often as is asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.tokenflow_ext.scalar_quantize_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:10])
        ctx.options = inputs[10:]

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, thresholds, values, curves, flips, *grads = ctx.saved_tensors
        sizes, height, width, *options = ctx.options
        given = [number for number, grad in enumerate(grads) if grad is not None]
        features = rows.new_zeros(len(rows), rows.shape[2], height, width)

        def outputs(rows: Tensor) -> tuple[Tensor, ...]:
            found = _outputs(
                rows, (thresholds, values, curves), flips, sizes, (height, width), *options
            )
            return tuple(found[number] for number in given)

        def pooled(h: Tensor) -> Tensor:
            grids = zip(sizes[::2], sizes[1::2], strict=True)
            return torch.cat(
                [F.interpolate(h, size, mode="area").flatten(2).mT for size in grids], 1
            )

        def gradient(rows: Tensor, *grads: Tensor) -> Tensor:
            (by_rows,) = torch.func.vjp(outputs, rows)[1](grads)
            return torch.func.vjp(pooled, features)[1](by_rows)[0]

        pullback = torch.func.vjp(gradient, rows, *(grads[number] for number in given))[1]
        by_rows, *found = pullback(grad_grad)
        by_grads: list[Tensor | None] = [None] * len(grads)
        for number, grad in zip(given, found, strict=True):
            by_grads[number] = grad
        return by_rows, *[None] * 4, *by_grads, *[None] * len(ctx.options)


def _outputs(
    rows: Tensor,
    tables: tuple[Tensor, Tensor, Tensor | None],
    flips: Tensor | None,
    flat_sizes: Sequence[int],
    size: Size,
    rounds: Sequence[int],
    bilinear: bool,
    group: int,
    stand_in: int,
    slopes: Sequence[float],
) -> tuple[Tensor, ...]:
    """quantized, rows, error, entropy and chance of rows [B, L, D] in plain PyTorch, with z in the
    place of the values: what the kernels differentiate, for derivatives of their gradient."""
    thresholds, values, curves = tables
    sizes = list(zip(flat_sizes[::2], flat_sizes[1::2], strict=True))
    counts = [height * width for height, width in sizes]
    mode = "bilinear" if bilinear else "bicubic"
    maps, errors, entropies, chances = [], [], [], []
    flipped = [None] * len(sizes) if flips is None else flips.split(counts, dim=1)
    for scale, (part, flip) in enumerate(zip(rows.split(counts, dim=1), flipped, strict=True)):
        number = rounds[scale]
        codes = _nearest(part.detach(), thresholds[number], values[number], flip)
        z = in_place_of_values(part, None if curves is None else curves[number], group, stand_in)
        plane = z.mT.unflatten(2, sizes[scale])
        maps.append(F.interpolate(plane, size, mode=mode, align_corners=False))
        errors.append((z - codes).square().mean())
        if slopes:
            logits = z * slopes[scale]
            bits = logits.sigmoid()
            entropies.append((F.softplus(logits) - logits * bits).sum(-1).mean())
            chances.append(bits.mean(dim=(0, 1)))
    found = [torch.stack(maps).sum(0), rows, torch.stack(errors)]
    return (*found, *(torch.stack(parts) for parts in (entropies, chances) if parts))


def in_place_of_values(rows: Tensor, curves: Tensor | None, group: int, stand_in: int) -> Tensor:
    """z of rows [..., D], see `quantize`."""
    if STAND_INS[stand_in] == "unit":
        return F.normalize(rows.unflatten(-1, (-1, group)), dim=-1).flatten(-2)
    if curves is None:
        return rows
    inner, shift, outer, offset = curves
    y = rows * inner + shift
    return outer * (y.tanh() if STAND_INS[stand_in] == "tanh" else y.clamp(-1, 1)) + offset


class Rows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.tokenflow_ext.scalar_rows(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.stand_in = inputs[5]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        by_rows = with_gradient(RowsGradient)(*ctx.saved_tensors, grad, ctx.stand_in)
        return by_rows, *[None] * 6


class RowsGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.tokenflow_ext.scalar_rows_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.stand_in = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, thresholds, values, curves, grad = ctx.saved_tensors

        def quantized(rows: Tensor) -> Tensor:
            rest, total = rows, torch.zeros_like(rows)
            for number in range(len(values)):
                curve = None if curves is None else curves[number]
                total = total + in_place_of_values(rest, curve, rows.shape[-1], ctx.stand_in)
                rest = rest - _nearest(rest.detach(), thresholds[number], values[number])
            return total

        def gradient(rows: Tensor, grad: Tensor) -> Tensor:
            return torch.func.vjp(quantized, rows)[1](grad)[0]

        by_rows, by_grad = torch.func.vjp(gradient, rows, grad)[1](grad_grad)
        return by_rows, None, None, None, by_grad, None


def _nearest(
    rows: Tensor, thresholds: Tensor, values: Tensor, flips: Tensor | None = None
) -> Tensor:
    """Values of rows [..., D] of one round."""
    digits = (rows.unsqueeze(-2) > thresholds).sum(-2)
    if flips is not None:
        digits = digits ^ flips.long()
    flat = values.gather(0, digits.reshape(-1, rows.shape[-1]))
    return flat.view(rows.shape)


for _name, _function in (
    ("scalar_quantize", Quantize),
    ("scalar_quantize_backward", QuantizeGradient),
    ("scalar_rows", Rows),
    ("scalar_rows_backward", RowsGradient),
):
    torch.library.register_autograd(
        f"tokenflow_ext::{_name}", _function.backward, setup_context=_function.setup_context
    )


@torch.library.register_fake("tokenflow_ext::scalar_quantize")
def _(
    h: Tensor,
    thresholds: Tensor,
    values: Tensor,
    curves: Tensor | None,
    flips: Tensor | None,
    sizes: list[int],
    rounds: list[int],
    bilinear: bool,
    places: list[int],
    stand_in: int,
    slopes: list[float],
    errors: bool,
    keep_rows: bool,
) -> tuple[Tensor, ...]:
    check_devices("h", h=h, thresholds=thresholds, values=values, curves=curves, flips=flips)
    batch, dim, tokens, scales = h.shape[0], h.shape[1], num_tokens(sizes), len(sizes) // 2
    return (
        torch.empty_like(h, memory_format=torch.contiguous_format),
        h.new_empty((batch, dim // len(places), tokens), dtype=torch.int64),
        h.new_empty((batch, tokens, dim) if keep_rows else 0),
        h.new_empty(scales if errors else 0),
        h.new_empty(scales if slopes else 0),
        h.new_empty((scales, dim) if slopes else 0),
    )


@torch.library.register_fake("tokenflow_ext::scalar_quantize_backward")
def _(
    rows: Tensor,
    thresholds: Tensor,
    values: Tensor,
    curves: Tensor | None,
    flips: Tensor | None,
    grad_quantized: Tensor | None,
    grad_rows: Tensor | None,
    grad_error: Tensor | None,
    grad_entropy: Tensor | None,
    grad_chance: Tensor | None,
    sizes: list[int],
    height: int,
    width: int,
    rounds: list[int],
    bilinear: bool,
    group: int,
    stand_in: int,
    slopes: list[float],
) -> Tensor:
    tables = {"thresholds": thresholds, "values": values, "curves": curves, "flips": flips}
    check_devices("rows", rows=rows, **tables)
    return rows.new_empty((rows.shape[0], rows.shape[2], height, width))


@torch.library.register_fake("tokenflow_ext::scalar_rows")
def _(
    rows: Tensor,
    thresholds: Tensor,
    values: Tensor,
    curves: Tensor | None,
    places: list[int],
    stand_in: int,
    keep_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("rows", rows=rows, thresholds=thresholds, values=values, curves=curves)
    by_round = (*rows.shape[:-1], thresholds.shape[0])
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        rows.new_empty(by_round if places else 0, dtype=torch.int64),
        rows.new_empty((*by_round, rows.shape[-1]) if keep_codes else 0),
    )


@torch.library.register_fake("tokenflow_ext::scalar_rows_backward")
def _(
    rows: Tensor,
    thresholds: Tensor,
    values: Tensor,
    curves: Tensor | None,
    grad_quantized: Tensor,
    stand_in: int,
) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@torch.library.register_fake("tokenflow_ext::pack_digits")
def _(digits: Tensor, places: list[int]) -> Tensor:
    batch, tokens, channels = digits.shape
    return digits.new_empty((batch, channels // len(places), tokens), dtype=torch.int64)


for _name in (
    "scalar_quantize",
    "scalar_quantize_backward",
    "scalar_rows",
    "scalar_rows_backward",
    "pack_digits",
):
    ops.register_vmap(_name)
