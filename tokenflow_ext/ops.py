"""The compiled operators as functions, with their fake kernels and gradients.

Each operator is registered with `torch.library` under `torch.ops.tokenflow_ext` (schemas:
csrc/torch/schema.cpp), so it composes with `torch.compile`, `torch.export` and autograd. The
functions here take the groups of a codebook side by side, `codebook [K, D]` with
`D = sum(dims)`, and scales as (height, width) pairs. `codebook [G, K, D]` is G codebooks, each with
an index of its own over G * D channels, in one call (product quantization). float32 runs on CPU and
CUDA, float64 on the CPU; half precision is computed in float32 and cast back by the callers that
expose it.

Errors are raised before a kernel runs: RuntimeError naming the argument and what was got. What
would need the data itself (a NaN in the codebook, the range of indices) is checked on the CPU; on
CUDA that would wait for the device, and the result is defined instead: a row that holds a NaN, or
a codebook that does, gets some index in range, and an index out of range adds nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._build import load_library

load_library()

Size = tuple[int, int]

#: How codes are compared: by the weighted distance or its square, or by the inner product.
Metric = Literal["l2", "squared_l2", "dot"]
METRICS: tuple[Metric, ...] = ("l2", "squared_l2", "dot")  # as csrc/common/codebook.h numbers them


class QuantizeResult(NamedTuple):
    """What `multiscale_quantize` returns."""

    quantized: Tensor
    """f^, the sum over scales of upsampled codes, [B, D, H, W]; straight-through gradient to h."""
    indices: Tensor
    """Token indices, scale after scale, [B, sum(h * w)] int64; -1 where the scale was dropped.
    [B, G, sum(h * w)] of G codebooks."""
    code_error: Tensor
    """Mean of squared differences q - z of each scale, [S] or [G, S], differentiable in the
    codebook."""
    row_error: Tensor
    """The same numbers, differentiable in h."""
    hits: Tensor
    """How often each code was chosen, [K] or [G, K] int64."""


def as_sizes(scales: Sequence[int | Size]) -> list[Size]:
    """(height, width) of scales given by their side or by both."""
    return [_as_size(scale) for scale in scales]


def _as_size(scale: int | Size) -> Size:
    if isinstance(scale, Integral):
        return int(scale), int(scale)
    height, width = cast(Size, scale)
    return int(height), int(width)


def flatten_sizes(sizes: Sequence[Size]) -> list[int]:
    return [side for size in sizes for side in size]


def num_tokens(flat_sizes: Sequence[int]) -> int:
    return sum(h * w for h, w in zip(flat_sizes[::2], flat_sizes[1::2], strict=True))


def nearest_code(
    rows: Tensor,
    codebook: Tensor,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    l2_norm: bool = True,
    *,
    metric: Metric = "l2",
) -> Tensor:
    """Index of every row's nearest code, without a distance matrix (arXiv 2412.03069, eq. 1-3).

    Args:
        rows: [N, D] float32 or float64, or [G, N, D] for G codebooks.
        codebook: [K, D], the groups side by side, or [G, K, D].
        dims: width of each group; one group of D columns by default.
        weights: weight of each group's squared distance or inner product; 1 by default.
        l2_norm: scale each group of rows and codes to unit length first.
        metric: "l2" or "squared_l2", the code at the smallest distance, or "dot", that of the
            largest inner product.

    Returns:
        [N] or [G, N] int64, the code float64 arithmetic finds for these inputs, the lowest on a
        tie, at every magnitude that float32 holds; of float64 inputs, where the squares of
        differences fit (from about 1e-150 to 1e150). Index 0 for a row that is not finite.

    Raises:
        ValueError: an unknown metric.
        RuntimeError: as said of the module.
    """
    dims = list(rows.shape[-1:] if dims is None else dims)
    weights = [1.0] * len(dims) if weights is None else [float(w) for w in weights]
    return torch.ops.tokenflow_ext.nearest_code(
        rows, codebook, dims, weights, l2_norm, metric_number(metric)
    )


def metric_number(metric: Metric) -> int:
    """How the operators know a metric.

    Raises:
        ValueError: an unknown one.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    return METRICS.index(metric)


def multiscale_quantize(
    h: Tensor,
    codebook: Tensor,
    dims: Sequence[int],
    sizes: Sequence[Size],
    weights: Sequence[float] | None = None,
    l2_norm: bool = True,
    dropped: Tensor | None = None,
    atomic_codebook_gradient: bool = False,
    metric: Metric = "l2",
) -> QuantizeResult:
    """The multi-scale residual loop in one call (arXiv 2412.03069, section 3.1).

    Args:
        h: features [B, D, H, W], or [B, G * D, H, W] for G codebooks, float32 or float64.
        codebook: [K, D], the groups side by side, or [G, K, D].
        dims: width of each group, summing to D.
        sizes: (height, width) of every scale.
        weights: weight of each group's squared distance; 1 by default.
        l2_norm: scale each group of features and codes to unit length.
        dropped: number of one scale to leave out, as one int64 on h's device, or a negative number.
        atomic_codebook_gradient: on CUDA, sum the codebook's gradient by float32 atomics in their
            order of arrival: no sort, but not the same bits in every run. Of no effect on the CPU
            and under `torch.use_deterministic_algorithms(True)`, where the sum is always in order.
        metric: as for `nearest_code`.
    """
    weights = [1.0] * len(dims) if weights is None else [float(w) for w in weights]
    return QuantizeResult(
        *with_gradient(_Quantize)(
            h,
            codebook,
            dropped,
            list(dims),
            weights,
            flatten_sizes(sizes),
            l2_norm,
            atomic_codebook_gradient,
            metric_number(metric),
        )
    )


def multiscale_rows(
    h: Tensor,
    codebook: Tensor,
    indices: Tensor,
    dims: Sequence[int],
    sizes: Sequence[Size],
    l2_norm: bool = True,
) -> Tensor:
    """The rows every scale searched with, [B, L, D] or [B, G, L, D], normalised as the search saw
    them.

    Not differentiable: statistics are made of them.

    Args:
        h, codebook, dims, sizes, l2_norm: as for `multiscale_quantize`.
        indices: [B, L] or [B, G, L] int64, its result.
    """
    return torch.ops.tokenflow_ext.multiscale_rows(
        h.detach(), codebook.detach(), indices, list(dims), flatten_sizes(sizes), l2_norm
    )


def multiscale_decode(
    indices: Tensor,
    codebook: Tensor,
    dims: Sequence[int],
    sizes: Sequence[Size],
    output_size: Size,
    l2_norm: bool = True,
) -> Tensor:
    """`f^ [B, D, *output_size]` from indices [B, L]: the sum over scales of upsampled codes.

    Of G codebooks, `[B, G * D, *output_size]` from [B, G, L]. Not differentiable: tokens are data
    here.
    """
    return torch.ops.tokenflow_ext.multiscale_decode(
        indices, codebook.detach(), list(dims), flatten_sizes(sizes), *output_size, l2_norm
    )


def segment_sum(rows: Tensor, indices: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Sums of rows [N, D] by index [N], [num_segments, D], and how many each sum holds.

    Rows are added in order, in float64 where that costs nothing, so the result is the same in
    every run. An index of -1 is skipped.
    """
    return with_gradient(_SegmentSum)(rows, indices, num_segments)


def normalize_groups(x: Tensor, dims: Sequence[int], l2_norm: bool) -> Tensor:
    """Each group of the last dimension at unit length with `l2_norm`, otherwise x itself."""
    if not l2_norm:
        return x
    return torch.cat([F.normalize(group, dim=-1) for group in x.split(list(dims), -1)], dim=-1)


def count_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code stands in indices of any shape, [codebook_size] int64; -1 is no code."""
    hits = indices.new_zeros(codebook_size + 1)
    hits.scatter_add_(0, indices.flatten() + 1, torch.ones_like(indices).flatten())
    return hits[1:]


def check_devices(like: str, /, **tensors: Tensor | None) -> None:
    """A tensor on the meta device beside others comes to the fake kernels, which know no data."""
    first = tensors[like]
    assert first is not None
    device = first.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise RuntimeError(
                f"{name} must be on the device of {like} ({device}), got {tensor.device}"
            )


@torch.library.register_fake("tokenflow_ext::nearest_code")
def _(
    rows: Tensor,
    codebook: Tensor,
    dims: list[int],
    weights: list[float],
    l2_norm: bool,
    metric: int = 0,
) -> Tensor:
    check_devices("rows", rows=rows, codebook=codebook)
    return rows.new_empty(rows.shape[:-1], dtype=torch.int64)


@torch.library.register_fake("tokenflow_ext::multiscale_quantize")
def _(
    h: Tensor,
    codebook: Tensor,
    dropped: Tensor | None,
    dims: list[int],
    weights: list[float],
    sizes: list[int],
    l2_norm: bool,
    atomic_codebook_gradient: bool = False,
    metric: int = 0,
) -> tuple[Tensor, ...]:
    check_devices("h", h=h, codebook=codebook, dropped=dropped)
    books, scales = codebook.shape[:-2], len(sizes) // 2
    return (
        torch.empty_like(h, memory_format=torch.contiguous_format),
        h.new_empty((h.shape[0], *books, num_tokens(sizes)), dtype=torch.int64),
        h.new_empty((*books, scales)),
        h.new_empty((*books, scales)),
        h.new_empty(codebook.shape[:-1], dtype=torch.int64),
    )


@torch.library.register_fake("tokenflow_ext::multiscale_quantize_backward")
def _(
    h: Tensor,
    codebook: Tensor,
    indices: Tensor,
    grad_quantized: Tensor,
    grad_code_error: Tensor | None,
    grad_row_error: Tensor,
    dims: list[int],
    sizes: list[int],
    l2_norm: bool,
    atomic_codebook_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    check_devices(
        "h",
        h=h,
        codebook=codebook,
        indices=indices,
        grad_quantized=grad_quantized,
        grad_code_error=grad_code_error,
        grad_row_error=grad_row_error,
    )
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(h, memory_format=contiguous),
        torch.empty_like(codebook, memory_format=contiguous),
    )


@torch.library.register_fake("tokenflow_ext::multiscale_rows")
def _(
    h: Tensor,
    codebook: Tensor,
    indices: Tensor,
    dims: list[int],
    sizes: list[int],
    l2_norm: bool,
) -> Tensor:
    check_devices("h", h=h, codebook=codebook, indices=indices)
    return h.new_empty((*indices.shape, codebook.shape[-1]))


@torch.library.register_fake("tokenflow_ext::multiscale_decode")
def _(
    indices: Tensor,
    codebook: Tensor,
    dims: list[int],
    sizes: list[int],
    height: int,
    width: int,
    l2_norm: bool,
) -> Tensor:
    check_devices("codebook", indices=indices, codebook=codebook)
    channels = codebook.shape[-1]
    if codebook.dim() == 3:
        channels *= codebook.shape[0]
    return codebook.new_empty((indices.shape[0], channels, height, width))


@torch.library.register_fake("tokenflow_ext::segment_sum")
def _(rows: Tensor, indices: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    check_devices("rows", rows=rows, indices=indices)
    return (
        rows.new_empty((num_segments, rows.shape[1])),
        rows.new_empty(num_segments, dtype=torch.int64),
    )


def _setup_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    h, codebook, _, ctx.dims, _, ctx.sizes, ctx.l2_norm, ctx.atomic_codebook_gradient, _ = inputs
    indices, hits = output[1], output[4]
    ctx.mark_non_differentiable(indices, hits)
    ctx.save_for_backward(h, codebook, indices)


def _quantize_backward(
    ctx: Any,
    grad_quantized: Tensor,
    _indices: None,
    grad_code_error: Tensor,
    grad_row_error: Tensor,
    _hits: None,
) -> tuple[Tensor | None, ...]:
    h, codebook, indices = ctx.saved_tensors
    wants_codebook = ctx.needs_input_grad[1]
    # As torch's own sums by index do: another algorithm, not an error.
    atomic = ctx.atomic_codebook_gradient and not torch.are_deterministic_algorithms_enabled()
    grad_h, grad_codebook = with_gradient(_QuantizeGradient)(
        h,
        codebook,
        indices,
        grad_quantized,
        grad_code_error if wants_codebook else None,
        grad_row_error,
        ctx.dims,
        ctx.sizes,
        ctx.l2_norm,
        atomic,
    )
    return grad_h, grad_codebook if wants_codebook else None, *[None] * 7


def with_gradient(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The operator with its gradient, to be called. `torch.func` and forward-mode differentiation
    take no gradient that is registered with an operator (forward mode would be zero without a
    word), and `torch.compile` takes no function inside a function's gradient."""
    return _direct(function) if torch.compiler.is_compiling() else _eager(function)


@functools.cache
def _eager(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A function is applied where a gradient is wanted: that takes as long as a small operator. It
    asks for the signature of `forward` at every call, and making one takes as long again: here it
    is made once."""
    cast(Any, function.forward).__signature__ = inspect.signature(function.forward)
    direct = _direct(function)

    def call(*inputs: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        )
        return function.apply(*inputs) if wanted else direct(*inputs)

    return call


def _direct(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        for value in inputs:
            if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                message = "forward mode (jvp) is not implemented by these operators"
                raise NotImplementedError(message)
        return function.forward(*inputs)

    return call


class _Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.tokenflow_ext.multiscale_quantize(*inputs)

    setup_context = staticmethod(_setup_quantize)
    backward = staticmethod(_quantize_backward)


class _QuantizeGradient(torch.autograd.Function):
    """The gradient of the loop, itself differentiable as often as is asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.tokenflow_ext.multiscale_quantize_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        h, codebook, indices, grad_quantized, grad_code_error, grad_row_error, *options = inputs
        ctx.dims, ctx.sizes, ctx.l2_norm, _ = options
        ctx.save_for_backward(h, codebook, indices, grad_quantized, grad_code_error, grad_row_error)

    @staticmethod
    def backward(
        ctx: Any, grad_grad_h: Tensor, grad_grad_codebook: Tensor
    ) -> tuple[Tensor | None, ...]:
        h, codebook, indices, grad_quantized, grad_code_error, grad_row_error = ctx.saved_tensors
        wants_codebook = grad_code_error is not None
        if not wants_codebook:
            grad_code_error = torch.zeros_like(grad_row_error)

        def loop(h: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _frozen_loop(h, codebook, indices, ctx.dims, ctx.sizes, ctx.l2_norm)

        def gradient(h: Tensor, codebook: Tensor, *grads: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.vjp(loop, h, codebook)[1](grads)

        pullback = torch.func.vjp(
            gradient, h, codebook, grad_quantized, grad_code_error, grad_row_error
        )[1]
        grads = pullback((grad_grad_h, grad_grad_codebook))
        if not wants_codebook:
            grads = (*grads[:3], None, grads[4])
        return *grads[:2], None, *grads[2:], *[None] * 4


def _frozen_loop(
    h: Tensor,
    codebook: Tensor,
    indices: Tensor,
    dims: Sequence[int],
    flat_sizes: Sequence[int],
    l2_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """quantized, code_error and row_error with the tokens given, in plain PyTorch: what the kernels
    differentiate, for derivatives of their gradient."""
    if codebook.dim() == 3:  # codebook by codebook
        parts = zip(
            h.chunk(len(codebook), dim=1), codebook.unbind(), indices.unbind(1), strict=True
        )
        maps, *errors = zip(
            *(_frozen_loop(*part, dims, flat_sizes, l2_norm) for part in parts), strict=True
        )
        return torch.cat(maps, dim=1), torch.stack(errors[0]), torch.stack(errors[1])
    sizes = list(zip(flat_sizes[::2], flat_sizes[1::2], strict=True))
    tokens = indices.split([height * width for height, width in sizes], dim=1)
    codes = normalize_groups(codebook, dims, l2_norm)
    residual, quantized, code_error, row_error = h, torch.zeros_like(h), [], []
    for size, index in zip(sizes, tokens, strict=True):
        # The tokens of a dropped scale are -1.
        present = (index >= 0).unsqueeze(-1).to(h.dtype)
        rows = F.interpolate(residual, size, mode="area").flatten(2).mT
        z = normalize_groups(rows, dims, l2_norm)
        q = F.embedding(index.clamp(min=0), codes)
        code_error.append((present * (q - z.detach())).square().mean())
        row_error.append((present * (q.detach() - z)).square().mean())
        grid = present * (z + (q - z).detach())
        grid = grid.mT.unflatten(2, size)
        upsampled = F.interpolate(grid, h.shape[2:], mode="bicubic", align_corners=False)
        quantized = quantized + upsampled
        residual = residual - upsampled.detach()
    return quantized, torch.stack(code_error), torch.stack(row_error)


class _SegmentSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, indices: Tensor, num_segments: int) -> Any:
        return torch.ops.tokenflow_ext.segment_sum(rows, indices, num_segments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _counts: None) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        rows = F.embedding(indices.clamp(min=0), grad_sums)
        return torch.where((indices >= 0).unsqueeze(1), rows, 0), None, None


for _name, _function in (
    ("multiscale_quantize", _Quantize),
    ("multiscale_quantize_backward", _QuantizeGradient),
    ("segment_sum", _SegmentSum),
):
    torch.library.register_autograd(
        f"tokenflow_ext::{_name}", _function.backward, setup_context=_function.setup_context
    )


def register_vmap(name: str) -> None:
    """One call for each entry of the mapped dimension: every entry has statistics of its own."""
    operator = getattr(torch.ops.tokenflow_ext, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        results = [
            operator(
                *(
                    arg.select(dim, entry) if isinstance(dim, int) else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for entry in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(f"tokenflow_ext::{name}", rule)


for _name in (
    "nearest_code",
    "multiscale_quantize",
    "multiscale_quantize_backward",
    "multiscale_rows",
    "multiscale_decode",
    "segment_sum",
):
    register_vmap(_name)
