"""Drawing codes from logits: guidance, top-k, top-p, min-p and the draw in one kernel.

`MultiStepSampler` takes a model through TokenFlow's sampling with it (arXiv 2412.03069, section
3.3), `SamplingLogitsProcessor` transformers' `generate`.

Random numbers are counter-based (Philox 4x32-10): the same seed and offset give the same codes for
any split of a batch, any number of threads, on the CPU and on CUDA. docs/guides/sampling.md has the
definition, the results for inputs that make no sense, and how to use seeds.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops  # noqa: F401  (loads the operators)
from .reference import filtered_logits

_SEEDS = 2**63 - 1
_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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


def _integer(value: Any, name: str) -> int:
    """A Python, NumPy or symbolic integer."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{name} must be an integer, got {value!r} of {type(value).__name__}")


def _bits(value: Any, name: str) -> int:
    """The lowest 64 bits of an integer, signed: seeds and offsets are taken modulo 2^64."""
    return (_integer(value, name) + 2**63) % 2**64 - 2**63


def _count(value: Any, name: str) -> int:
    value = _integer(value, name)
    if value >= 2**31:
        raise ValueError(f"{name} must be at most 2**31 - 1, got {value}")
    return max(value, 0)


def _float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r} of {type(value).__name__}")
    return float(value)


def _row_argument(
    value: Any,
    name: str,
    convert: Callable[[Any, str], Any],
    shape: torch.Size,
    device: torch.device,
    of: str = "logits",
) -> tuple[Any, Tensor | None]:
    """An argument as the operator takes it: a number, or a tensor of one or of one a row."""
    if not isinstance(value, Tensor):
        return convert(value, name), None
    if convert is _float:
        default, dtype, kinds = 0.0, torch.float64, (*_FLOATS, *_INTEGERS)
    else:
        default, dtype, kinds = 0, torch.int64, _INTEGERS
    if value.dtype not in kinds:
        what = "numbers" if convert is _float else "integers"
        raise ValueError(f"{name} must hold {what}, got {value.dtype}")
    # As everywhere in torch, a single number may lie on the CPU.
    if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
        raise ValueError(f"{name} must be on the device of {of}, {device}, got {value.device}")
    value = value.detach().to(device=device, dtype=dtype)
    if value.dim() == 0:
        return default, value
    try:
        return default, value.expand(shape).reshape(-1).contiguous()
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be one number or one for each row of {of} {list(shape)}, "
            f"got shape {list(value.shape)}"
        ) from error


def _check_source(seed: Any, generator: Any) -> None:
    """One source of random numbers."""
    if generator is None:
        return
    if seed is not None:
        raise ValueError("seed and generator exclude each other: a generator draws the seed")
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; a number drawn "
            "from another is a seed"
        )


def _slice(vocab: Any, codes: int) -> tuple[int, int]:
    try:
        start, stop = (_integer(bound, "vocab") for bound in vocab)
        if 0 <= start < stop <= codes:
            return start, stop
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"vocab must be a slice (start, stop) of {codes} codes that is not empty, got {vocab}"
    )


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
        offset: place in the seed's stream, 0 by default, modulo 2^64. With one seed and one offset,
            row r of the flattened batch draws at offset + r; with a seed or an offset for each row,
            each row draws at just its own.
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
        start, stop = _slice(vocab, logits.shape[-1])
        logits = logits.narrow(-1, start, stop - start)
        uncond = None if uncond is None else uncond.narrow(-1, start, stop - start)
    shape, device = logits.shape[:-1], logits.device
    _check_source(seed, generator)
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
        *_row_argument(top_k, "top_k", _count, shape, device),
        *_row_argument(top_p, "top_p", _float, shape, device),
        *_row_argument(min_p, "min_p", _float, shape, device),
        *_row_argument(temperature, "temperature", _float, shape, device),
        *_row_argument(guidance, "guidance", _float, shape, device),
        *_row_argument(seed, "seed", _bits, shape, device),
        *_row_argument(0 if offset is None else offset, "offset", _bits, shape, device),
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
    scale is drawn once. Guidance grows over the scales, t = guidance * k / (S - 1)::

        sampler = MultiStepSampler.three_step(scales=(1, 2, 4, 6, 8, 10, 12, 14, 16))
        for k in range(sampler.num_scales):
            tokens = sampler.sample_scale(k, model, seed=0)

    Here `model(k, tokens)` gives the logits of scale k, `tokens` being None or what was drawn.
    """

    top_k: Sequence[int] = (1200, 100, 1)
    """Of each step; <= 0 is off, 1 is the argmax."""
    top_p: Sequence[float] = (0.8, 0.8, 0.0)
    """Of each step; <= 0 is off."""
    min_p: float | Sequence[float] = 0.0
    """Of each step, or one number for all; <= 0 is off."""
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
        if isinstance(self.min_p, Sequence) and len(self.min_p) != len(self.top_k):
            raise ValueError(
                f"min_p must be one number or one for each of {len(self.top_k)} steps, got "
                f"{self.min_p}"
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
            min_p=self.min_p[step] if isinstance(self.min_p, Sequence) else self.min_p,
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


class _DrawnScores(Tensor):
    """Scores whose token a `SamplingLogitsProcessor` draws. Functions of them see an ordinary
    tensor, and what they return is such scores again; but when `torch.multinomial` is asked for a
    token, as `generate` does with `do_sample`, it is the processor that draws. Other ways to pick a
    token know nothing of the seed and are refused."""

    plain: Tensor
    processor: SamplingLogitsProcessor

    @classmethod
    def of(cls, plain: Tensor, processor: SamplingLogitsProcessor) -> _DrawnScores:
        scores = plain.as_subclass(cls)
        scores.plain, scores.processor = plain, processor
        return scores

    @classmethod
    def __torch_function__(
        cls, func: Callable, _types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        processors = []

        def plain(value: Any) -> Any:
            if type(value) in (tuple, list):
                return type(value)(map(plain, value))
            if not isinstance(value, cls):
                return value
            processors.append(value.processor)
            return value.plain

        plain_args = plain(args)
        plain_kwargs = {name: plain(value) for name, value in (kwargs or {}).items()}
        processor = processors[0]
        if func in (torch.multinomial, Tensor.multinomial):
            return processor.draw(*plain_args, **plain_kwargs)
        if processor.seed is not None or processor.generator is not None:
            if func in (torch.argmax, Tensor.argmax):
                raise ValueError(
                    "seed and generator: without do_sample generate takes the likeliest token; "
                    "pass do_sample=True, or neither of them"
                )
            if func is Tensor.__setitem__ and not isinstance(args[0], cls):
                raise ValueError(
                    "seed and generator: assisted decoding (assistant_model, "
                    "prompt_lookup_num_tokens) draws with torch's own generator; pass neither"
                )
        out = func(*plain_args, **plain_kwargs)
        floating = isinstance(out, Tensor) and out.is_floating_point()
        return cls.of(out, processor) if floating else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.plain.clone()


class SamplingLogitsProcessor:
    """What `sample_top_k_top_p` does before it draws, as one logits processor of transformers'
    `generate`: a slice of the vocabulary, guidance, temperature, top-k, top-p and min-p.

        processor = SamplingLogitsProcessor(top_k=1200, top_p=0.8, seed=0)
        model.generate(ids, do_sample=True, top_k=0, logits_processor=[processor])

    Scores are guided and divided by the temperature, those of dropped codes are -inf. `generate`
    goes on from there as with its own processors: `do_sample`, `num_beams`, an assistant and the
    filters that it puts behind (with `do_sample` it has a top_k of 50 by default) do what they
    always do, and `scores` of its output are those drawn from. Unguided and at temperature 1 the
    scores that stay are as they were.

    With a seed, a generator or guidance, the token is drawn here, where `generate` with `do_sample`
    asks torch for it: after all other filters, in the seed's stream, one token for both halves of
    guidance.

    Args:
        top_k, top_p, min_p, temperature, vocab: as for `sample_top_k_top_p`.
        guidance: t of classifier-free guidance. With t != 0 the batch holds the conditional rows
            and, after them, as many unconditional ones; both halves take the token drawn.
        seed: of all draws; each draw goes on in its stream where the last one ended.
        generator: draws a seed for each draw.
        check: look at the scores and raise errors for them: on by default on the CPU; elsewhere it
            waits for the device.

    Raises:
        ValueError: an argument is out of range; scores are not [B, V], or of an odd number of rows
            with guidance; with `check`, a row leaves no token; with a seed or a generator,
            `generate` draws elsewhere (assisted decoding, beams) or not at all (`do_sample=False`).
    """

    def __init__(
        self,
        *,
        top_k: int = 0,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        guidance: float = 0.0,
        vocab: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        check: bool | None = None,
    ) -> None:
        self.top_k = _count(top_k, "top_k")
        self.top_p = _float(top_p, "top_p")
        self.min_p = _float(min_p, "min_p")
        self.temperature = _float(temperature, "temperature")
        self.guidance = _float(guidance, "guidance")
        for name in ("top_p", "min_p"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not abs(self.guidance) <= 1e30:
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        self.vocab = vocab
        _check_source(seed, generator)
        self.seed = None if seed is None else _bits(seed, "seed")
        self.generator = generator
        self.check = check
        self.drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] as they are to be drawn from."""
        drawing = self.seed is not None or self.generator is not None or self.guidance != 0
        processor = self if drawing else None
        if isinstance(scores, _DrawnScores):
            if drawing:
                raise ValueError(
                    "only one SamplingLogitsProcessor can have a seed, a generator or guidance"
                )
            scores, processor = scores.plain, scores.processor
        if scores.dim() != 2:
            raise ValueError(f"scores must be [B, V], got shape {list(scores.shape)}")
        rows, codes = scores.shape
        if self.guidance != 0 and rows % 2:
            raise ValueError(
                "with guidance, scores must hold as many unconditional rows after the "
                f"conditional ones, got {rows} rows"
            )
        cond, uncond = (scores, None) if self.guidance == 0 else scores.chunk(2)
        start, stop = (0, codes) if self.vocab is None else _slice(self.vocab, codes)
        z = filtered_logits(
            cond,
            uncond=uncond,
            guidance=self.guidance,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            temperature=self.temperature,
            vocab=(start, stop),
        )
        if scores.device.type == "cpu" if self.check is None else self.check:
            empty = ~(z > -torch.inf).any(dim=-1)
            if empty.any():
                row = int(empty.nonzero()[0])
                raise ValueError(
                    "scores must leave a token to draw and hold neither a NaN nor +infinity, not "
                    f"so in row {row}"
                )
        # Rows that would overflow are moved, which no softmax notices. The bound of the temperature
        # is one below which no float32 that is not the largest has a share.
        z = z / max(self.temperature, 1e-200)
        most = torch.finfo(scores.dtype).max
        z = z - (z.amax(dim=-1, keepdim=True) - most).clamp(min=0)
        filtered = scores.new_full((len(cond), codes), -torch.inf)
        filtered[:, start:stop] = z
        if uncond is not None:
            filtered = filtered.repeat(2, 1)
        return filtered if processor is None else _DrawnScores.of(filtered, processor)

    def draw(self, probabilities: Tensor, num_samples: int, replacement: bool = False) -> Tensor:
        """Tokens [B, 1] of probabilities [B, V], with guidance the same for both halves; called as
        `torch.multinomial` is."""
        if num_samples != 1:
            raise ValueError(
                "seed, generator and guidance draw one token a row, and generate with num_beams "
                f"and do_sample asks for {num_samples}; pass num_beams=1 or do_sample=False"
            )
        rows = probabilities if self.guidance == 0 else probabilities.chunk(2)[0]
        tokens = sample_top_k_top_p(
            rows.log().float(),
            seed=self.seed,
            offset=None if self.seed is None else self.drawn,
            generator=self.generator,
            check=self.check,
        )
        self.drawn += len(rows)
        return tokens.repeat(len(probabilities) // len(rows)).unsqueeze(1)
