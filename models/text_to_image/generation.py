"""Generation of image tokens with a key-value cache: each run computes one scale's positions.

What later scales see of a scale is its own first run, whose input is f-hat of the scales before it
as in training. The refinement runs of the scale, whose input includes the drawn tokens, write over
these entries; they are put back before the next scale. The loop over the runs of a scale is the
sampler's (:class:`tokenflow_ext.sampler.MultiStepSampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tokenflow_ext.sampler import MultiStepSampler, SamplingConfig

from .backbone import Layer

if TYPE_CHECKING:
    from tokenflow_ext import MultiScaleQuantizer

    from .model import TextToImage
    from .sequence import NextScaleSequence

Mix = Callable[["tuple[Tensor, Tensor] | Tensor", int], Tensor]
"""(the logits of a scale, both halves where there are two; the scale's index) -> what f^ grows by,
[B, h * w, D], in the place of the drawn codes."""

OnScale = Callable[[Tensor], None]
"""Told the tokens of the scales that are drawn so far, [B, l], after each scale."""


class KeyValueCache:
    """Keys and values of every layer, [rows, heads, length, head_dim], written in place.

    ``positions`` says which ones the coming run computes. It writes over what a run of the same
    positions wrote, and its attention reads all entries up to its end.
    """

    def __init__(
        self,
        like: Tensor,
        layers: int,
        rows: int,
        heads: int,
        head_dim: int,
        sequence: NextScaleSequence,
    ) -> None:
        self.entries = like.new_empty((layers, 2, rows, heads, sequence.length, head_dim))
        # Made when a scale is refined: who draws each once does without.
        self.kept: Tensor | None = None
        self.longest = max(side * side for side in sequence.scales)
        self.positions = (0, 0)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Stores the run's keys and values [rows, heads, n, head_dim] of a layer; returns those of
        all positions up to the run's end."""
        first, end = self.positions
        keys, values = self.entries[layer]
        keys[:, :, first:end] = key
        values[:, :, first:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, first: int, end: int) -> None:
        """Sets the entries of these positions aside."""
        if self.kept is None:
            shape = (*self.entries.shape[:4], self.longest, self.entries.shape[5])
            self.kept = self.entries.new_empty(shape)
        self.kept[..., : end - first, :] = self.entries[..., first:end, :]

    def put_back(self, first: int, end: int) -> None:
        """Undoes what was written to these positions since :meth:`keep`."""
        assert self.kept is not None
        self.entries[..., first:end, :] = self.kept[..., : end - first, :]


class ScaleSession:
    """The buffers of one generation, scale by scale, and CUDA graphs where they are asked for.

    Args:
        sequence: the definition of positions.
        cache: of keys and values.
        device: where the model is.
    """

    def __init__(
        self, sequence: NextScaleSequence, cache: KeyValueCache, device: torch.device
    ) -> None:
        self.sequence, self.cache, self.device = sequence, cache, device
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def run_first(self) -> Tensor:
        """Logits [rows, 1, K] of the first scale, from what comes before an image."""
        raise NotImplementedError

    def run_scale(self, scale: int, f_hat: Tensor) -> Tensor:
        """f-hat at a scale's size [B, C, h, w] -> logits [rows, h * w, K].

        Nothing here waits for the device, and every buffer keeps its place, so that it can be
        captured in a CUDA graph.
        """
        raise NotImplementedError

    def replay_scale(self, scale: int, f_hat: Tensor) -> Tensor:
        """:meth:`run_scale` as a CUDA graph, captured at first; the next replay of the scale
        overwrites the logits."""
        with torch.cuda.device(self.device):
            if scale not in self.graphs:
                self.graphs[scale] = self._capture(scale, f_hat.clone())
            graph, features, logits = self.graphs[scale]
            features.copy_(f_hat)
            graph.replay()
        return logits

    def _capture(self, scale: int, features: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # cuBLAS and the attention allocate workspaces and pick kernels in their first runs.
            for _ in range(2):
                self.run_scale(scale, features)
        torch.cuda.current_stream().wait_stream(side)
        # Graphs run one after another: they share the memory of their intermediates.
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self.run_scale(scale, features)
        return graph, features, logits


class Session(ScaleSession):
    """A generation of text to image: masks and RoPE too.

    Args:
        sequence: the definition of positions.
        rows: prompts in a batch, conditional and negative ones together.
        padded: whether any prompt is padded; without padding no run of a scale needs a mask.
    """

    def __init__(
        self, model: TextToImage, sequence: NextScaleSequence, rows: int, padded: bool
    ) -> None:
        attention = cast(Layer, model.model.layers[0]).self_attn
        heads, like = attention.k_proj.out_features // attention.head_dim, model.lm_head.weight
        layers = len(model.model.layers)
        cache = KeyValueCache(like, layers, rows, heads, attention.head_dim, sequence)
        device = model.device
        super().__init__(sequence, cache, device)
        self.model = model
        self.rows = rows
        self.padded = padded
        self.scale_ids = sequence.scale_ids().to(device)
        like = torch.empty(0, device=device, dtype=model.lm_head.weight.dtype)
        self.cos, self.sin = model.rotary(like, sequence.length)
        self.masks = [
            torch.empty(rows, 1, 1, sequence.positions(scale)[1], dtype=torch.bool, device=device)
            for scale in range(len(sequence.scales))
        ]
        self.prompts: tuple[Tensor, Tensor] | None = None

    def _layers(self, inputs: Tensor, positions: tuple[int, int], mask: Tensor | None) -> Tensor:
        first, end = self.cache.positions = positions
        rotary = self.cos[:, first:end], self.sin[:, first:end]
        return self.model.run_layers(inputs, rotary, mask, self.cache)

    def run_first(self) -> Tensor:
        """From ``prompts``: ids and which of them are no padding, [rows, T] each."""
        assert self.prompts is not None
        ids, valid = self.prompts
        text = self.sequence.text
        if self.padded:
            for scale, mask in enumerate(self.masks):
                # All positions of a scale see the same keys: one row of the mask stands for them.
                first, end = self.sequence.positions(scale)
                mask.copy_(self.sequence.mask(valid, first, end)[:, :, :1])
        inputs = self.model.embed_text(ids)
        hidden = self._layers(inputs, (0, text), self.sequence.mask(valid, 0, text))
        return self.model.image_logits(hidden[:, -1:])

    def run_scale(self, scale: int, f_hat: Tensor) -> Tensor:
        """See the base class."""
        first, end = self.sequence.positions(scale)
        position = first - (self.sequence.text - 1)
        inputs = self.model.embed_image(f_hat.flatten(2).mT, position, self.scale_ids[first:end])
        inputs = inputs.repeat(self.rows // inputs.shape[0], 1, 1)
        mask = self.masks[scale] if self.padded else None
        return self.model.image_logits(self._layers(inputs, (first, end), mask))


def generate_tokens(
    session: ScaleSession,
    quantizer: MultiScaleQuantizer,
    count: int,
    *,
    sampling: SamplingConfig,
    seeds: Tensor,
    cuda_graphs: bool,
    mix: Mix | None = None,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Tokens [count, L], scale after scale. A session of 2 * count rows has the negative half last.

    Random numbers are counted within an image: token j of the image (over all scales) takes, in
    step n, number n * L + j of its image's seed. No two draws share one, and none depends on the
    batch.

    Args:
        seeds: of the images, [count].
        mix: gives what f^ grows by in the place of the drawn codes; it is called for each scale.
        on_scale: is told the tokens so far; an error that it raises ends the generation.
    """
    sequence = session.sequence
    sampler = MultiStepSampler.of(sampling, sequence.scales)
    seeds = seeds.to(session.device)
    numbers = torch.arange(sum(side * side for side in sequence.scales), device=session.device)
    run_scale = session.replay_scale if cuda_graphs else session.run_scale
    f_hat: Tensor | None = None
    last: tuple[Tensor, Tensor] | Tensor | None = None

    def halves(logits: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        if logits.dtype == torch.float64:  # the sampler's own arithmetic is float32
            logits = logits.float()
        return tuple(logits.split(count)) if len(logits) > count else logits

    def answer(scale: int, tokens: Tensor | None) -> tuple[Tensor, Tensor] | Tensor:
        nonlocal last
        if f_hat is None:
            last = halves(session.run_first())
            return last
        last = halves(run_scale(scale, quantizer.scale_input(f_hat, scale, tokens)))
        if tokens is None and sampler.steps(scale) > 1:
            session.cache.keep(*sequence.positions(scale))
        return last

    def offsets(scale: int, step: int) -> Tensor:
        first, end = (at - (sequence.text - 1) for at in sequence.positions(scale))
        return numbers[first:end] + step * len(numbers)

    drawn: list[Tensor] = []
    for scale in range(sampler.num_scales):
        if scale:
            grown = drawn[-1]
            if mix is not None:
                assert last is not None
                grown = mix(last, scale - 1)
            f_hat = quantizer.accumulate(f_hat, grown, scale - 1)
        drawn.append(sampler.sample_scale(scale, answer, seed=seeds, offsets=offsets))
        if sampler.steps(scale) > 1:
            session.cache.put_back(*sequence.positions(scale))
        if on_scale is not None:
            on_scale(torch.cat(drawn, dim=1))
    if mix is not None:
        assert last is not None
        mix(last, sampler.num_scales - 1)
    return torch.cat(drawn, dim=1)


def session_for(
    model: TextToImage, sequence: NextScaleSequence, ids: Tensor, valid: Tensor, cuda_graphs: bool
) -> Session:
    """The session of prompts: with new buffers, or with graphs those of the last generation of the
    same shape.

    Args:
        ids, valid: prompts and which of their positions are no padding, [rows, T] each.

    Raises:
        ValueError: graphs are asked for, and the model is not on CUDA.
    """
    rows, padded = len(ids), not bool(valid.all())
    if not cuda_graphs:
        session = Session(model, sequence, rows, padded)
    else:
        if model.device.type != "cuda":
            raise ValueError(f"cuda_graphs needs the model on CUDA, it is on {model.device}")
        kept = model._session
        if kept is None or (kept.sequence, kept.rows, kept.padded) != (sequence, rows, padded):
            kept = model._session = Session(model, sequence, rows, padded)
        session = kept
    session.prompts = ids, valid
    return session


def image_seeds(seed: int | Sequence[int] | None, count: int) -> Tensor:
    """One seed for each image, [count] int64."""
    if seed is None:
        return torch.randint(2**62, (count,))
    if isinstance(seed, (int, Integral)):
        return torch.arange(int(seed), int(seed) + count)
    if len(seed) != count:
        raise ValueError(f"seed must be one number or {count}, one for each image, got {len(seed)}")
    return torch.tensor([int(value) for value in seed])
