"""Generation of image tokens with a key-value cache: each run computes one scale's positions.

What later scales see of a scale is its own first run, whose input is f-hat of the scales before it
as in training. The refinement runs of the scale, whose input includes the drawn tokens, write over
these entries; they are put back before the next scale. The loop over the runs of a scale is the
sampler's (:class:`tokenflow_ext.sampler.MultiStepSampler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tokenflow_ext.sampler import MultiStepSampler, SamplingConfig

from .backbone import Layer

if TYPE_CHECKING:
    from .model import TextToImage
    from .sequence import NextScaleSequence


class KeyValueCache:
    """Keys and values of every layer, [rows, heads, length, head_dim], written in place.

    ``positions`` says which ones the coming run computes. It writes over what a run of the same
    positions wrote, and its attention reads all entries up to its end.
    """

    def __init__(self, model: TextToImage, rows: int, sequence: NextScaleSequence) -> None:
        like = model.lm_head.weight
        attention = cast(Layer, model.model.layers[0]).self_attn
        heads = attention.k_proj.out_features // attention.head_dim
        shape = (len(model.model.layers), 2, rows, heads)

        def entries(length: int) -> Tensor:
            return like.new_empty((*shape, length, attention.head_dim))

        self.entries = entries(sequence.length)
        self.kept = entries(max(side * side for side in sequence.scales))
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
        self.kept[..., : end - first, :] = self.entries[..., first:end, :]

    def put_back(self, first: int, end: int) -> None:
        """Undoes what was written to these positions since :meth:`keep`."""
        self.entries[..., first:end, :] = self.kept[..., : end - first, :]


class Session:
    """The buffers of one generation: cache, masks, RoPE, and CUDA graphs where they are asked for.

    Args:
        sequence: the definition of positions.
        rows: prompts in a batch, conditional and negative ones together.
        padded: whether any prompt is padded; without padding no run of a scale needs a mask.
    """

    def __init__(
        self, model: TextToImage, sequence: NextScaleSequence, rows: int, padded: bool
    ) -> None:
        self.model = model
        self.sequence = sequence
        self.rows = rows
        self.padded = padded
        self.cache = KeyValueCache(model, rows, sequence)
        device = model.device
        self.scale_ids = sequence.scale_ids().to(device)
        like = torch.empty(0, device=device, dtype=model.lm_head.weight.dtype)
        self.cos, self.sin = model.rotary(like, sequence.length)
        self.masks = [
            torch.empty(rows, 1, 1, sequence.positions(scale)[1], dtype=torch.bool, device=device)
            for scale in range(len(sequence.scales))
        ]
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def _layers(self, inputs: Tensor, positions: tuple[int, int], mask: Tensor | None) -> Tensor:
        first, end = self.cache.positions = positions
        rotary = self.cos[:, first:end], self.sin[:, first:end]
        return self.model.run_layers(inputs, rotary, mask, self.cache)

    def run_text(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Prompts [rows, T] -> logits of the first scale [rows, 1, K]."""
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
        """f-hat at a scale's size [B, C, h, w] -> logits [rows, h * w, K].

        Nothing here waits for the device, and every buffer keeps its place, so that it can be
        captured in a CUDA graph.
        """
        first, end = self.sequence.positions(scale)
        position = first - (self.sequence.text - 1)
        inputs = self.model.embed_image(f_hat.flatten(2).mT, position, self.scale_ids[first:end])
        inputs = inputs.repeat(self.rows // inputs.shape[0], 1, 1)
        mask = self.masks[scale] if self.padded else None
        return self.model.image_logits(self._layers(inputs, (first, end), mask))

    def replay_scale(self, scale: int, f_hat: Tensor) -> Tensor:
        """:meth:`run_scale` as a CUDA graph, captured at first; the next replay of the scale
        overwrites the logits."""
        with torch.cuda.device(self.model.device):
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


def generate_tokens(
    model: TextToImage,
    sequence: NextScaleSequence,
    ids: Tensor,
    valid: Tensor,
    count: int,
    *,
    sampling: SamplingConfig,
    seed: int | Sequence[int] | None,
    cuda_graphs: bool,
) -> Tensor:
    """Tokens [count, L]; ids and valid are [count or 2 * count, T], the negative half last.

    Arguments and errors: :meth:`TextToImage.generate_tokens`, which checks ids and masks.

    Random numbers are counted within an image: token j of the image (over all scales) takes, in
    step n, number n * L + j of its image's seed. No two draws share one, and none depends on the
    batch.
    """
    sampler = MultiStepSampler.of(sampling, sequence.scales)
    seeds = _seeds(seed, count).to(model.device)
    numbers = torch.arange(model.config.image_tokens, device=model.device)
    session = _session(model, sequence, ids.shape[0], not bool(valid.all()), cuda_graphs)
    run_scale = session.replay_scale if cuda_graphs else session.run_scale
    quantizer = model.tokenizer.quantizer
    f_hat: Tensor | None = None

    def halves(logits: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        if logits.dtype == torch.float64:  # the sampler's own arithmetic is float32
            logits = logits.float()
        return tuple(logits.split(count)) if len(logits) > count else logits

    def answer(scale: int, tokens: Tensor | None) -> tuple[Tensor, Tensor] | Tensor:
        if f_hat is None:
            return halves(session.run_text(ids, valid))
        logits = halves(run_scale(scale, quantizer.scale_input(f_hat, scale, tokens)))
        if tokens is None and sampler.steps(scale) > 1:
            session.cache.keep(*sequence.positions(scale))
        return logits

    def offsets(scale: int, step: int) -> Tensor:
        first, end = (at - (sequence.text - 1) for at in sequence.positions(scale))
        return numbers[first:end] + step * len(numbers)

    drawn: list[Tensor] = []
    for scale in range(sampler.num_scales):
        if scale:
            f_hat = quantizer.accumulate(f_hat, drawn[-1], scale - 1)
        drawn.append(sampler.sample_scale(scale, answer, seed=seeds, offsets=offsets))
        if sampler.steps(scale) > 1:
            session.cache.put_back(*sequence.positions(scale))
    return torch.cat(drawn, dim=1)


def _session(
    model: TextToImage, sequence: NextScaleSequence, rows: int, padded: bool, cuda_graphs: bool
) -> Session:
    """New buffers, or with graphs those of the last generation of the same shape."""
    if not cuda_graphs:
        return Session(model, sequence, rows, padded)
    if model.device.type != "cuda":
        raise ValueError(f"cuda_graphs needs the model on CUDA, it is on {model.device}")
    kept = model._session
    if kept is None or (kept.sequence, kept.rows, kept.padded) != (sequence, rows, padded):
        kept = model._session = Session(model, sequence, rows, padded)
    return kept


def _seeds(seed: int | Sequence[int] | None, count: int) -> Tensor:
    """One seed for each image, [count] int64."""
    if seed is None:
        return torch.randint(2**62, (count,))
    if isinstance(seed, (int, Integral)):
        return torch.arange(int(seed), int(seed) + count)
    if len(seed) != count:
        raise ValueError(f"seed must be one number or {count}, one for each image, got {len(seed)}")
    return torch.tensor([int(value) for value in seed])
