"""The sampler as a logits processor of transformers' `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenflow_ext.reference import filtered_logits

from .arguments import bits, check_source, count, number, vocab_slice
from .operators import sample_top_k_top_p


class _DrawnScores(Tensor):
    """Scores whose token a `SamplingLogitsProcessor` draws. Functions of them see an ordinary
    tensor, and what they return is such scores again; but when `torch.multinomial` is asked for a
    token, as `generate` does with `do_sample`, it is the processor that draws. Other ways to pick a
    token know nothing of the seed and raise an error."""

    plain: Tensor
    processor: SamplingLogitsProcessor

    @classmethod
    def of(cls, plain: Tensor, processor: SamplingLogitsProcessor) -> _DrawnScores:
        scores = plain.as_subclass(cls)
        scores.plain, scores.processor = plain, processor
        return scores

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
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
        self.top_k = count(top_k, "top_k")
        self.top_p = number(top_p, "top_p")
        self.min_p = number(min_p, "min_p")
        self.temperature = number(temperature, "temperature")
        self.guidance = number(guidance, "guidance")
        for name in ("top_p", "min_p"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not abs(self.guidance) <= 1e30:
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        self.vocab = vocab
        check_source(seed, generator)
        self.seed = None if seed is None else bits(seed, "seed")
        self.generator = generator
        self.check = check
        self.drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] as they are to be drawn from."""
        drawing = self.seed is not None or self.generator is not None or self.guidance != 0
        processor: SamplingLogitsProcessor | None = self if drawing else None
        if isinstance(scores, _DrawnScores):
            if drawing:
                raise ValueError(
                    "only one SamplingLogitsProcessor can have a seed, a generator or guidance"
                )
            processor = scores.processor
            scores = scores.plain
        if scores.dim() != 2:
            raise ValueError(f"scores must be [B, V], got shape {list(scores.shape)}")
        rows, codes = scores.shape
        if self.guidance != 0 and rows % 2:
            raise ValueError(
                "with guidance, scores must hold as many unconditional rows after the "
                f"conditional ones, got {rows} rows"
            )
        cond, uncond = (scores, None) if self.guidance == 0 else scores.chunk(2)
        start, stop = (0, codes) if self.vocab is None else vocab_slice(self.vocab, codes)
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
