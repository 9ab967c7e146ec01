"""Drawing codes by their closeness to rows: stochastic codes, without a matrix of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import Metric, check_devices, metric_number
from .sampler.arguments import bits, check_source, number, row_argument


def sample_code(
    rows: Tensor,
    codebook: Tensor,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    l2_norm: bool = True,
    *,
    temperature: float = 1.0,
    metric: Metric = "l2",
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
        offset: position in the seed's stream. With one seed and one offset, row r draws
            at offset + r; with a seed or an offset for each row, each row draws at just its own.

    Returns:
        [N] int64; 0 for a row that is not finite.

    Raises:
        RuntimeError: shapes, dtypes, devices, weights or temperature do not fit.
        ValueError: an unknown metric, no number, or a seed or offset of another shape.
    """
    metric_id = metric_number(metric)
    dims = list(rows.shape[-1:] if dims is None else dims)
    weights = [1.0] * len(dims) if weights is None else [float(w) for w in weights]
    check_source(seed, generator)
    shape, device = rows.shape[:1], rows.device
    if seed is None:
        where = device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=where).to(device)
    elif isinstance(seed, Tensor) and seed.dim() > 0 and seed.shape != shape:
        raise ValueError(
            f"seed must be one number or one for each row of rows {list(shape)}, got shape "
            f"{list(seed.shape)}"
        )
    return torch.ops.tokenflow_ext.sample_code(
        rows.detach(),
        codebook.detach(),
        dims,
        weights,
        l2_norm,
        metric_id,
        number(temperature, "temperature"),
        *row_argument(seed, "seed", bits, shape, device, "rows"),
        *row_argument(offset, "offset", bits, shape, device, "rows"),
    )


@torch.library.register_fake("tokenflow_ext::sample_code")
def _(
    rows: Tensor,
    codebook: Tensor,
    dims: list[int],
    weights: list[float],
    l2_norm: bool,
    metric: int,
    temperature: float,
    seed: int,
    seed_rows: Tensor | None,
    offset: int,
    offset_rows: Tensor | None,
) -> Tensor:
    check_devices("rows", rows=rows, codebook=codebook, seed=seed_rows, offset=offset_rows)
    return rows.new_empty(rows.shape[0], dtype=torch.int64)
