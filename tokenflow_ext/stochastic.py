"""Drawing codes by their closeness to rows: stochastic codes, without a matrix of logits."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenflow_ext.ops import check_devices

METRICS = ("l2", "squared_l2", "dot")  # in the order of csrc/common/gumbel.h


def _in_stream(value: int | Tensor, name: str, rows: Tensor) -> tuple[int, Tensor | None]:
    """A seed or offset as the operator takes it: a number, or a tensor of one or of one a row."""
    if not isinstance(value, Tensor):
        try:
            return (operator.index(value) + 2**63) % 2**64 - 2**63, None  # the same 64 bits, signed
        except TypeError:
            raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if value.dtype != torch.int64 or (value.dim() and value.shape != rows.shape[:1]):
        raise ValueError(
            f"{name} must be int64, one number or one for each row {list(rows.shape[:1])}, got "
            f"{value.dtype} of shape {list(value.shape)}"
        )
    return 0, value.contiguous()


def sample_code(
    rows: Tensor,
    codebook: Tensor,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    l2_norm: bool = True,
    *,
    temperature: float = 1.0,
    metric: str = "l2",
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """Draws a code for every row with the probabilities softmax(scores / temperature).

    A Gumbel-max draw over all K codes whose noise is counter-based (Philox 4x32-10, one number for
    a row and a code): a seed gives the same codes for any split of the rows, any number of threads,
    any instruction set and, up to the last bits of a float64 score, on the CPU and on CUDA.

    Args:
        rows: [N, D] float32 or float64.
        codebook: [K, D], the groups side by side.
        dims: width of each group; one group of D columns by default.
        weights: weight of each group's squared distance or product; 1 by default.
        l2_norm: scale each group of rows and codes to unit length first.
        temperature: what scores are divided by; 0 takes the largest, the lowest index on a tie.
        metric: a code's score: "l2" minus the distance, "squared_l2" minus its square, "dot" the
            inner product.
        generator: draws the seed where none is given; torch's own by default.
        seed: of the random numbers, 64 bits; one for all rows, or one for each, [N].
        offset: place in the seed's stream. With one seed and one offset, row r draws
            at offset + r; with a seed or an offset for each row, each row draws at just its own.

    Returns:
        [N] int64; 0 for a row that is not finite.

    Raises:
        RuntimeError: shapes, dtypes, devices, weights or temperature do not fit.
        ValueError: an unknown metric, or a seed or offset of another shape.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    dims = list(rows.shape[-1:] if dims is None else dims)
    weights = [1.0] * len(dims) if weights is None else [float(w) for w in weights]
    if seed is None:
        where = rows.device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=where).to(rows.device)
    elif generator is not None:
        raise ValueError("seed and generator exclude each other: a generator draws the seed")
    return torch.ops.tokenflow_ext.sample_code(
        rows.detach(),
        codebook.detach(),
        dims,
        weights,
        l2_norm,
        METRICS.index(metric),
        temperature,
        *_in_stream(seed, "seed", rows),
        *_in_stream(offset, "offset", rows),
    )


@torch.library.register_fake("tokenflow_ext::sample_code")
def _(
    rows,
    codebook,
    dims,
    weights,
    l2_norm,
    metric,
    temperature,
    seed,
    seed_rows,
    offset,
    offset_rows,
):
    check_devices("rows", rows=rows, codebook=codebook, seed=seed_rows, offset=offset_rows)
    return rows.new_empty(rows.shape[0], dtype=torch.int64)
