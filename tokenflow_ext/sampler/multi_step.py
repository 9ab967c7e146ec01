"""TokenFlow's multi-step sampling: the loop over scales, and over the steps of a scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenflow_ext._deprecated import warn_renamed

from .config import SamplingConfig
from .operators import sample_top_k_top_p

ScaleModel = Callable[[int, Tensor | None], "Tensor | tuple[Tensor, Tensor]"]
"""(scale's index, its drawn tokens [..., s²] or None before the first draw) -> logits [..., s², V],
or (logits, unconditional logits)."""

Offsets = Callable[[int, int], "int | Tensor"]
"""(scale's index, step) -> position in the seed's stream, one number or one for each token."""


@dataclass
class MultiStepSampler(SamplingConfig):
    """Multi-step sampling over scales (arXiv 2412.03069, section 3.3 and Table 6).

    At every scale but the first, the tokens drawn with (top_k[0], top_p[0]) go back into the model
    as that scale's own input and are drawn again with (top_k[1], top_p[1]), and so on; the first
    scale is drawn once. Guidance grows over the scales, t = guidance * k / (S - 1)::

        sampler = MultiStepSampler.preset("three", scales=(1, 2, 4, 6, 8, 10, 12, 14, 16))
        for k in range(sampler.num_scales):
            tokens = sampler.sample_scale(k, model, seed=0)

    where `model(k, tokens)` gives the logits of scale k, `tokens` being None or what was drawn.
    """

    scales: Sequence[int] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    """Sides of the scales, coarse to fine."""
    vocab: tuple[int, int] | None = None
    """Where the image tokens stand among the logits; all of them by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales:
            raise ValueError("scales must not be empty")

    @classmethod
    def of(
        cls,
        config: SamplingConfig,
        scales: Sequence[int],
        vocab: tuple[int, int] | None = None,
    ) -> MultiStepSampler:
        """A sampler with the settings of a configuration."""
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(SamplingConfig)}
        return cls(**settings, scales=scales, vocab=vocab)

    @classmethod
    def three_step(cls, **settings: Any) -> MultiStepSampler:
        """The name of before for `preset("three")`."""
        warn_renamed("MultiStepSampler.three_step", 'MultiStepSampler.preset("three")')
        return cls.preset("three", **settings)

    @classmethod
    def two_step(cls, **settings: Any) -> MultiStepSampler:
        """The name of before for `preset("two")`."""
        warn_renamed("MultiStepSampler.two_step", 'MultiStepSampler.preset("two")')
        return cls.preset("two", **settings)

    @classmethod
    def single(cls, **settings: Any) -> MultiStepSampler:
        """The name of before for `preset("one")`."""
        warn_renamed("MultiStepSampler.single", 'MultiStepSampler.preset("one")')
        return cls.preset("one", **settings)

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

        A tensor of seeds, one for each of logits' first dimension (the images), makes an image's
        tokens the same in any batch.

        Args:
            offset: position in the seed's stream. One number, or one for each token of an image, or
                one for each row. By default each (scale, step) draws in a part of the stream of its
                own: the step's number in the upper half of the 64 bits, the row in the lower.
        """
        if seed is not None:
            counted = offset is None
            if offset is None:
                offset = (scale * len(self.top_k) + step) << 32
            by_row = seed.shape == logits.shape[:-1] if isinstance(seed, Tensor) else False
            if isinstance(seed, Tensor) and seed.dim() > 0 and (counted or not by_row):
                seed, offset = _by_image(seed, offset, logits)
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
        offsets: Offsets | None = None,
        check: bool | None = None,
    ) -> Tensor:
        """Tokens of scale `scale` (0-based): the model is asked `steps(scale)` times.

        Args:
            offsets: the `offset` of `draw` for each (scale, step); its own default without it.
        """
        if not 0 <= scale < self.num_scales:
            raise ValueError(f"scale must be 0 to {self.num_scales - 1}, got {scale}")

        def draw(step: int, tokens: Tensor | None) -> Tensor:
            answer = model(scale, tokens)
            logits, uncond = answer if isinstance(answer, tuple) else (answer, None)
            offset = None if offsets is None else offsets(scale, step)
            return self.draw(
                scale,
                step,
                logits,
                uncond,
                generator=generator,
                seed=seed,
                offset=offset,
                check=check,
            )

        tokens = draw(0, None)
        for step in range(1, self.steps(scale)):
            tokens = draw(step, tokens)
        return tokens

    def sample(
        self,
        model: ScaleModel,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        offsets: Offsets | None = None,
        check: bool | None = None,
    ) -> list[Tensor]:
        """Tokens of every scale, coarse to fine. The model keeps what it is to remember of earlier
        scales: a call with tokens None begins a scale, and the tokens it was last drawn are final
        then (`sample_scale` returns them, one scale at a time)."""
        return [
            self.sample_scale(
                scale, model, generator=generator, seed=seed, offsets=offsets, check=check
            )
            for scale in range(self.num_scales)
        ]


def _by_image(seed: Tensor, offset: int | Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds of images, [B], and an offset as seeds and offsets of logits' rows [B, ...]."""
    images, *tokens = logits.shape[:-1]
    if seed.shape != (images,):
        raise ValueError(
            f"seed must be one number or one for each of {images} images, got shape "
            f"{list(seed.shape)}"
        )
    if not isinstance(offset, Tensor) or offset.dim() == 0:
        positions = torch.arange(math.prod(tokens), device=logits.device).view(tokens)
        offset = (positions + offset).expand(images, *tokens)
    return seed.view(-1, *(1 for _ in tokens)).expand(images, *tokens), offset
