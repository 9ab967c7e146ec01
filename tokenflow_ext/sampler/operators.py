"""The draw itself: guidance, top-k, top-p, min-p and one code a row, in one kernel."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from tokenflow_ext import ops  # noqa: F401  (loads the operators)

from .arguments import bits, check_source, count, number, row_argument, vocab_slice

_SEEDS = 2**63 - 1


class Draw(NamedTuple):
    """What `sample_top_k_top_p` returns with `return_probability`."""

    indices: Tensor
    """[...] int64, relative to the slice `vocab`."""
    probability: Tensor
    """[...] float32: the drawn code's share of what the filters left; 0 where nothing was left."""


def _as_rows(logits: Tensor) -> Tensor:
    """[outer, inner, V] of [..., V]: a view wherever three dimensions can say it."""
    if logits.dim() > 3:
        logits = logits.flatten(0, -3)
    while logits.dim() < 3:
        logits = logits.unsqueeze(0)
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits


@overload
def sample_top_k_top_p(
    logits: Tensor,
    *,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    min_p: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    vocab: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    out: Tensor | None = None,
    return_probability: Literal[False] = False,
    check: bool | None = None,
) -> Tensor: ...


@overload
def sample_top_k_top_p(
    logits: Tensor,
    *,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    min_p: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    vocab: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    out: Tensor | None = None,
    return_probability: Literal[True],
    check: bool | None = None,
) -> Draw: ...


def sample_top_k_top_p(
    logits: Tensor,
    *,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    min_p: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    vocab: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    out: Tensor | None = None,
    return_probability: bool = False,
    check: bool | None = None,
) -> Tensor | Draw:
    """Draws a code for every row of logits.

    With guidance t the logits are (1 + t) logits - t uncond. Codes below the k-th largest are
    dropped (ties stay), then, going up from the smallest, codes while their cumulated probability
    is at most 1 - top_p (of equal ones the lower index first; the largest always stays), then codes
    of less than min_p times the largest probability. What is left is renormalised and drawn from by
    inversion, in order of the indices. A code whose logit, or whose unconditional logit where there
    is guidance, is -infinity or the lowest number of its dtype is masked: it is never drawn. Each
    argument of a row may be one number, a tensor of one number, or a tensor of one a row,
    `logits.shape[:-1]`.

    Args:
        logits: [..., V] float32, bfloat16 or float16. A slice of a larger vocabulary, any strides
            of the rows, halves of a batch: nothing is copied as long as a row's codes lie side by
            side.
        top_k: how many codes may stay; <= 0 and V or more are off, 1 is the argmax with the lowest
            index.
        top_p: the probability that stays; <= 0 is off.
        min_p: of the largest probability, what a code must have to stay; <= 0 is off.
        temperature: what logits are divided by, after guidance.
        uncond: [..., V], logits of the unconditional prompt, of the dtype of `logits`.
        guidance: t of classifier-free guidance; 0 leaves `uncond` unread.
        vocab: (start, stop), the codes to draw from; others are never read.
        generator: draws the seed where none is given; torch's own by default. A CUDA generator is
            asked on the device, so a captured CUDA graph draws anew in every replay.
        seed: of the random numbers, any integer, taken modulo 2^64. A tensor is read on the device,
            when the kernel runs; one seed a row must have just the shape of the rows, as rows that
            share a seed by broadcasting would all draw alike.
        offset: position in the seed's stream, 0 by default, modulo 2^64. With one seed and one
            offset, row r of the flattened batch draws at offset + r. With a seed or an offset for
            each row, each row draws at just its own.
        out: int64 tensor for the indices, of shape `logits.shape[:-1]`.
        return_probability: return a `Draw` with the drawn code's probability.
        check: look at the data and raise errors for it: on by default on the CPU; elsewhere it
            waits for the device. Without it every row's result is defined, and no row has an effect
            on another: docs/guides/sampling.md.

    Returns:
        Indices [...] int64, relative to vocab's start, or a `Draw`.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit; with `check`, a row of logits holds a
            NaN, +infinity or nothing but masked codes, or top_p > 1, min_p > 1, temperature or
            guidance out of range. The message names the argument and the row.
        ValueError: an argument is of a wrong kind, shape or device, top_k is 2^31 or more, vocab
            makes no sense, or there are both a seed and a generator.
    """
    for name, tensor in (("logits", logits), ("uncond", logits if uncond is None else uncond)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if logits.dim() == 0:
        raise ValueError("logits must have a dimension of codes, got a number")
    if uncond is not None and (uncond.shape, uncond.device) != (logits.shape, logits.device):
        raise ValueError(
            f"uncond must have the shape of logits {list(logits.shape)} and lie on "
            f"{logits.device}, got {list(uncond.shape)} on {uncond.device}"
        )
    if vocab is not None:
        start, stop = vocab_slice(vocab, logits.shape[-1])
        logits = logits.narrow(-1, start, stop - start)
        uncond = None if uncond is None else uncond.narrow(-1, start, stop - start)
    shape, device = logits.shape[:-1], logits.device
    check_source(seed, generator)
    if seed is None:
        where = device if generator is None else generator.device
        seed = torch.randint(_SEEDS, (), generator=generator, device=where).to(device)
    elif isinstance(seed, Tensor) and seed.dim() > 0 and seed.shape != shape:
        raise ValueError(
            f"seed must be one number or one for each row of logits {list(shape)}, got shape "
            f"{list(seed.shape)}"
        )

    indices, probability = torch.ops.tokenflow_ext.sample_top_k_top_p(
        _as_rows(logits.detach()),
        None if uncond is None else _as_rows(uncond.detach()),
        *row_argument(top_k, "top_k", count, shape, device),
        *row_argument(top_p, "top_p", number, shape, device),
        *row_argument(min_p, "min_p", number, shape, device),
        *row_argument(temperature, "temperature", number, shape, device),
        *row_argument(guidance, "guidance", number, shape, device),
        *row_argument(seed, "seed", bits, shape, device),
        *row_argument(0 if offset is None else offset, "offset", bits, shape, device),
        device.type == "cpu" if check is None else check,
    )
    indices = indices.view(shape)
    if out is not None:
        if out.shape != shape or out.dtype != torch.int64 or out.device != device:
            raise ValueError(
                f"out must be int64 of shape {list(shape)} on {device}, got {out.dtype} "
                f"{list(out.shape)} on {out.device}"
            )
        indices = out.copy_(indices)
    return Draw(indices, probability.view(shape)) if return_probability else indices


@torch.library.register_fake("tokenflow_ext::sample_top_k_top_p")
def _(logits: Tensor, uncond: Tensor | None, *_args: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0] * logits.shape[1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
    )
