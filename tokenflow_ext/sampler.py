"""Drawing codes from logits: guidance, top-k, top-p and the draw in one kernel.

`MultiStepSampler` takes a model through TokenFlow's sampling with it (arXiv 2412.03069, section
3.3), `SamplingLogitsProcessor` transformers' `generate`.

Random numbers are counter-based (Philox 4x32-10): the same seed and offset give the same codes for
any split of a batch, any number of threads, on the CPU and on CUDA. docs/sampling.md has the
definition, the results for inputs that make no sense, and how to use seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenflow_ext import ops  # noqa: F401  (loads the operators)

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


def _row_argument(
    value: Any, name: str, dtype: torch.dtype, shape: torch.Size, device: torch.device
) -> tuple[Any, Tensor | None]:
    """An argument as the operator takes it: a number, or a tensor of one or of one a row."""
    if not isinstance(value, Tensor):
        return value, None
    default = 0 if dtype == torch.int64 else 0.0
    if dtype == torch.int64 and (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"{name} must hold integers, got {value.dtype}")
    value = value.detach().to(device=device, dtype=dtype)
    if value.dim() == 0:
        return default, value
    try:
        return default, value.expand(shape).reshape(-1).contiguous()
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be one number or one for each row of logits {list(shape)}, "
            f"got shape {list(value.shape)}"
        ) from error


def sample_top_k_top_p(
    logits: Tensor,
    *,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
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
    is at most 1 - top_p (of equal ones the lower index first; the largest always stays). What is
    left is renormalised and drawn from by inversion, in order of the indices. Each argument of a
    row may be one number, a tensor of one number, or a tensor of one a row, `logits.shape[:-1]`.

    Args:
        logits: [..., V] float32, bfloat16 or float16. A slice of a larger vocabulary, any strides
            of the rows, halves of a batch: nothing is copied as long as a row's codes lie side by
            side.
        top_k: how many codes may stay; <= 0 is off, 1 is the argmax with the lowest index.
        top_p: the probability that stays; <= 0 is off.
        temperature: what logits are divided by, after guidance.
        uncond: [..., V], logits of the unconditional prompt, of the dtype of `logits`.
        guidance: t of classifier-free guidance; 0 leaves `uncond` unread.
        vocab: (start, stop), the codes to draw from; others are never read.
        generator: draws the seed where none is given; torch's own by default. A CUDA generator is
            asked on the device, so a captured CUDA graph draws anew in every replay.
        seed: of the random numbers, 64 bits. A tensor is read on the device, when the kernel runs;
            one seed a row must have just the shape of the rows, as rows that share a seed by
            broadcasting would all draw alike.
        offset: place in the seed's stream, 0 by default. With one seed and one offset, row r of the
            flattened batch draws at offset + r; with a seed or an offset for each row, each row
            draws at just its own.
        out: int64 tensor for the indices, of shape `logits.shape[:-1]`.
        return_probability: return a `Draw` with the drawn code's probability.
        check: look at the data and raise errors for it: on by default on the CPU; elsewhere it
            waits for the device. Without it every row's result is defined, and no row has an effect
            on another: docs/sampling.md.

    Returns:
        Indices [...] int64, relative to vocab's start, or a `Draw`.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit; with `check`, a row of logits holds a
            NaN, +infinity or nothing but -infinity, or top_k > V, top_p > 1, temperature or
            guidance out of range. The message names the argument and the row.
        ValueError: vocab or an argument's shape makes no sense.
    """
    if logits.dim() == 0:
        raise ValueError("logits must have a dimension of codes, got a number")
    if uncond is not None and uncond.shape != logits.shape:
        raise ValueError(
            f"uncond must have the shape of logits {list(logits.shape)}, got {list(uncond.shape)}"
        )
    if vocab is not None:
        start, stop = vocab
        if not 0 <= start < stop <= logits.shape[-1]:
            raise ValueError(
                f"vocab must be a slice (start, stop) of {logits.shape[-1]} codes that is not "
                f"empty, got {tuple(vocab)}"
            )
        logits = logits.narrow(-1, start, stop - start)
        uncond = None if uncond is None else uncond.narrow(-1, start, stop - start)
    shape, device = logits.shape[:-1], logits.device
    if seed is None:
        where = device if generator is None else generator.device
        seed = torch.randint(_SEEDS, (), generator=generator, device=where)
    elif not isinstance(seed, Tensor):
        seed = (seed + 2**63) % 2**64 - 2**63  # the same 64 bits, signed
    elif seed.dim() > 0 and seed.shape != shape:
        raise ValueError(
            f"seed must be one number or one for each row of logits {list(shape)}, got shape "
            f"{list(seed.shape)}"
        )
    indices, probability = torch.ops.tokenflow_ext.sample_top_k_top_p(
        _as_rows(logits.detach()),
        None if uncond is None else _as_rows(uncond.detach()),
        *_row_argument(top_k, "top_k", torch.int64, shape, device),
        *_row_argument(top_p, "top_p", torch.float64, shape, device),
        *_row_argument(temperature, "temperature", torch.float64, shape, device),
        *_row_argument(guidance, "guidance", torch.float64, shape, device),
        *_row_argument(seed, "seed", torch.int64, shape, device),
        *_row_argument(0 if offset is None else offset, "offset", torch.int64, shape, device),
        device.type == "cpu" if check is None else check,
    )
    indices = indices.view(shape)
    if out is not None:
        if out.shape != shape or out.dtype != torch.int64:
            raise ValueError(
                f"out must be int64 of shape {list(shape)}, got {out.dtype} {list(out.shape)}"
            )
        indices = out.copy_(indices)
    return Draw(indices, probability.view(shape)) if return_probability else indices


@torch.library.register_fake("tokenflow_ext::sample_top_k_top_p")
def _(logits, uncond, *_args):
    rows = logits.shape[0] * logits.shape[1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
    )


ScaleModel = Callable[[int, Tensor | None], "Tensor | tuple[Tensor, Tensor]"]
"""(scale's index, its drawn tokens [..., s²] or None before the first draw) -> logits [..., s², V],
or (logits, unconditional logits)."""


@dataclass
class MultiStepSampler:
    """Multi-step sampling over scales (arXiv 2412.03069, section 3.3 and Table 6).

    At every scale but the first, the tokens drawn with (top_k[0], top_p[0]) go back into the model
    as that scale's own input and are drawn again with (top_k[1], top_p[1]), and so on; the first
    scale is drawn once. Guidance grows over the scales, t = guidance * k / (S - 1).

        sampler = MultiStepSampler.three_step(scales=(1, 2, 4, 6, 8, 10, 12, 14, 16))
        for k in range(sampler.num_scales):
            tokens = sampler.sample_scale(k, model, seed=0)

    where `model(k, tokens)` gives the logits of scale k, `tokens` being None or what was drawn.
    """

    top_k: Sequence[int] = (1200, 100, 1)
    """Of each step; <= 0 is off, 1 is the argmax."""
    top_p: Sequence[float] = (0.8, 0.8, 0.0)
    """Of each step; <= 0 is off."""
    guidance: float = 7.5
    """cfg of the paper, reached at the last scale."""
    temperature: float = 1.0
    scales: Sequence[int] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    """Sides of the scales, coarse to fine."""
    vocab: tuple[int, int] | None = None
    """Where the image tokens stand among the logits; all of them by default."""

    def __post_init__(self) -> None:
        if len(self.top_k) != len(self.top_p) or not self.top_k:
            raise ValueError(
                f"top_k and top_p must name as many steps, at least one, got {self.top_k} and "
                f"{self.top_p}"
            )
        if not self.scales:
            raise ValueError("scales must not be empty")

    @classmethod
    def three_step(cls, **settings: Any) -> MultiStepSampler:
        """[1200, 100, 1] / [0.8, 0.8, 0], the paper's best."""
        return cls(top_k=(1200, 100, 1), top_p=(0.8, 0.8, 0.0), **settings)

    @classmethod
    def two_step(cls, **settings: Any) -> MultiStepSampler:
        """[1200, 1] / [0.8, 0]."""
        return cls(top_k=(1200, 1), top_p=(0.8, 0.0), **settings)

    @classmethod
    def single(cls, **settings: Any) -> MultiStepSampler:
        """[600] / [0.6]: every scale is drawn once."""
        return cls(top_k=(600,), top_p=(0.6,), **settings)

    @property
    def num_scales(self) -> int:
        """S."""
        return len(self.scales)

    @property
    def model_runs(self) -> int:
        """How often the model is asked for logits in an image: 1 + (S - 1) * steps."""
        return 1 + (self.num_scales - 1) * len(self.top_k)

    def steps(self, scale: int) -> int:
        """How often scale `scale` (0-based) is drawn."""
        return 1 if scale == 0 else len(self.top_k)

    def guidance_at(self, scale: int) -> float:
        """t at scale `scale` (0-based): 0 at the first, `guidance` at the last."""
        return self.guidance * scale / max(1, self.num_scales - 1)

    def draw(
        self,
        scale: int,
        step: int,
        logits: Tensor,
        uncond: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        offset: int | Tensor | None = None,
        check: bool | None = None,
    ) -> Tensor:
        """One step's tokens [...] from logits [..., V].

        With a seed and no offset, each (scale, step) draws in a part of the stream of its own: the
        step's number in the upper half of the 64 bits, the row in the lower. A tensor of seeds, one
        for each of logits' first dimension, makes an image's tokens the same in any batch.
        """
        if seed is not None and offset is None:
            offset = (scale * len(self.top_k) + step) << 32
            if isinstance(seed, Tensor) and seed.dim() > 0:
                images, *tokens = logits.shape[:-1]
                if seed.shape != (images,):
                    raise ValueError(
                        f"seed must be one number or one for each of {images} images, got shape "
                        f"{list(seed.shape)}"
                    )
                seed = seed.view(-1, *(1 for _ in tokens)).expand(images, *tokens)
                places = torch.arange(math.prod(tokens), device=logits.device).view(tokens)
                offset = (places + offset).expand(images, *tokens)
        t = self.guidance_at(scale)
        return sample_top_k_top_p(
            logits,
            top_k=self.top_k[step],
            top_p=self.top_p[step],
            temperature=self.temperature,
            uncond=uncond if t != 0 else None,
            guidance=t if uncond is not None else 0.0,
            vocab=self.vocab,
            generator=generator,
            seed=seed,
            offset=offset,
            check=check,
        )

    def sample_scale(
        self,
        scale: int,
        model: ScaleModel,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        check: bool | None = None,
    ) -> Tensor:
        """Tokens of scale `scale` (0-based): the model is asked `steps(scale)` times."""
        if not 0 <= scale < self.num_scales:
            raise ValueError(f"scale must be 0 to {self.num_scales - 1}, got {scale}")
        tokens = None
        for step in range(self.steps(scale)):
            logits = model(scale, tokens)
            logits, uncond = logits if isinstance(logits, tuple) else (logits, None)
            tokens = self.draw(
                scale, step, logits, uncond, generator=generator, seed=seed, check=check
            )
        return tokens

    def sample(
        self,
        model: ScaleModel,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        check: bool | None = None,
    ) -> list[Tensor]:
        """Tokens of every scale, coarse to fine. The model keeps what it is to remember of earlier
        scales: a call with tokens None begins a scale, and the tokens it was last drawn are final
        then (`sample_scale` returns them, one scale at a time)."""
        return [
            self.sample_scale(scale, model, generator=generator, seed=seed, check=check)
            for scale in range(self.num_scales)
        ]


class SamplingLogitsProcessor:
    """Draws inside transformers' `generate`: scores become 0 at the drawn token, -inf elsewhere, so
    that whatever `generate` does with them next, greedy or sampling, picks that token.

        model.generate(ids, logits_processor=[SamplingLogitsProcessor(top_k=1200, top_p=0.8)])

    Leave `generate`'s own top_k, top_p and temperature at what switches them off; they would change
    nothing but cost their time.

    Args:
        top_k, top_p, temperature, vocab, generator, check: as for `sample_top_k_top_p`.
        guidance: t of classifier-free guidance. With t != 0 the batch holds the conditional rows
            and, after them, as many unconditional ones; both halves take the token drawn.
        seed: of all draws; each call goes on in its stream where the last one ended. By default
            each call draws a seed from `generator`.
    """

    def __init__(
        self,
        *,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        guidance: float = 0.0,
        vocab: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        check: bool | None = None,
    ) -> None:
        self.settings = {
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
            "vocab": vocab,
            "generator": generator,
            "check": check,
        }
        self.guidance = guidance
        self.seed = seed
        self.drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with one token left in each row."""
        cond, uncond = scores, None
        if self.guidance != 0:
            if scores.shape[0] % 2:
                raise ValueError(
                    "with guidance, scores must hold as many unconditional rows after the "
                    f"conditional ones, got {scores.shape[0]} rows"
                )
            cond, uncond = scores.chunk(2)
        tokens = sample_top_k_top_p(
            cond,
            uncond=uncond,
            guidance=self.guidance,
            seed=self.seed,
            offset=None if self.seed is None else self.drawn,
            **self.settings,
        )
        self.drawn += cond.shape[0]
        start = 0 if self.settings["vocab"] is None else self.settings["vocab"][0]
        tokens = (tokens + start).repeat(scores.shape[0] // cond.shape[0])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)
