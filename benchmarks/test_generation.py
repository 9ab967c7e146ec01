"""Text to image: generation with the cache against computing the sequence anew in each run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from benchmarks.timing import clock, interleave, rounds_within
from tokenflow_ext.models import (
    BackboneConfig,
    PixelConfig,
    QuantizerConfig,
    TextToImage,
    TextToImageConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
)
from tokenflow_ext.sampler import MultiStepSampler

SCALES = (1, 2, 4, 6, 8, 10, 12, 14, 16)
TEXT = 61
GUIDANCE = 7.5
SHAPES = {
    "tiny": (
        BackboneConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
        ),
        2048,
    ),
    # TinyLlama-1B with the released tokenizer's codebook.
    "1B": (
        BackboneConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        ),
        32768,
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = ["tiny", "1B"] if metafunc.config.getoption("--large") else ["tiny"]
    metafunc.parametrize("shape", shapes)


def build(shape: str, device: str) -> TextToImage:
    """A model of random weights; bfloat16 on CUDA."""
    backbone, codes = SHAPES[shape]
    torch.manual_seed(0)
    side = SCALES[-1]
    # The decoder takes no part: a small one with the released tokenizer's 40 channels.
    pixel = PixelConfig(
        channels=8, multipliers=(1,), res_blocks=1, z_channels=8, code_dim=40, groups=4
    )
    quantizer = QuantizerConfig(codebook_size=codes, scales=SCALES)
    tokenizer = TokenFlowTokenizer(TokenizerConfig(side, pixel, quantizer=quantizer))
    config = TextToImageConfig.for_tokenizer(backbone, tokenizer, text_vocab_size=32000)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return TextToImage(config, tokenizer).to(device, dtype).eval()


@torch.no_grad()
def cacheless(model: TextToImage, ids: Tensor, negative: Tensor, seeds: list[int]) -> Tensor:
    """The algorithm as the method describes it: every run computes the sequence from its start."""
    sequence = model.sequence(ids.shape[1])
    quantizer = model.tokenizer.quantizer
    count = ids.shape[0]
    ids = torch.cat([ids, negative.expand(count, -1)])
    mask = sequence.mask(ids != model.config.pad_id)
    rotary = model.rotary(model.lm_head.weight[:0], sequence.length)
    levels = sequence.levels().to(ids.device)
    sampler = MultiStepSampler.preset("three", scales=SCALES, guidance=GUIDANCE)
    seed = torch.tensor(seeds, device=ids.device).unsqueeze(1)
    f_hat, drawn, inputs = None, [], []
    for scale in range(len(SCALES)):
        first, end = sequence.places(scale)
        number = first - (sequence.text - 1)
        if scale:
            f_hat = quantizer.accumulate(f_hat, drawn[-1], scale - 1)
            inputs.append(f_hat.flatten(2).mT)
        for step in range(sampler.steps(scale)):
            own = list(inputs)
            if step:
                own[-1] = own[-1] + quantizer.codes(tokens)  # noqa: F821
            hidden = model.embed_text(ids)
            if own:
                features = torch.cat(own, dim=1)
                image = model.embed_image(features, 1, levels[sequence.text : end])
                hidden = torch.cat([hidden, image.repeat(2, 1, 1)], dim=1)
            cos, sin = (part[:, :end] for part in rotary)
            hidden = model.run_layers(hidden, (cos, sin), mask[:, :, :end, :end])
            logits = model.image_logits(hidden[:, first:end])
            offset = torch.arange(number, number + end - first, device=ids.device)
            offset = offset + step * model.config.image_tokens
            tokens = sampler.draw(
                scale,
                step,
                *logits.split(count),
                seed=seed.repeat(1, end - first),
                offset=offset.repeat(count, 1),
            )
        drawn.append(tokens)
    return torch.cat(drawn, dim=1)


@contextmanager
def counted(layer: nn.Module) -> Iterator[list[int]]:
    """The places of every run of a layer."""
    places: list[int] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: places.append(inputs[0].shape[1]))
    yield places
    hook.remove()


def test_generation(benchmark, record, budget, device, batch, shape):
    model = build(shape, device)
    ids = torch.randint(32000, (batch, TEXT), generator=torch.Generator().manual_seed(1)).to(device)
    negative = ids[:1].flip(1)
    seeds = list(range(batch))

    def ours(cuda_graphs: bool = device == "cuda") -> Tensor:
        return model.generate_tokens(
            ids, negative, guidance=GUIDANCE, seed=seeds, cuda_graphs=cuda_graphs
        )

    def theirs() -> Tensor:
        return cacheless(model, ids, negative, seeds)

    positions, tokens = {}, {}
    if device == "cuda":
        ours()  # captures the graphs
    begin = clock()
    # Counted without graphs, whose replays no hook sees; also the warm-up.
    for name, call in (("ours", lambda: ours(cuda_graphs=False)), ("cacheless", theirs)):
        with counted(model.model.layers[0]) as places:
            tokens[name] = call()
        positions[name] = sum(places)
    one_round = clock() - begin
    differ = int((tokens["ours"] != tokens["cacheless"]).sum())
    rounds = rounds_within(budget, one_round, at_least=1 if shape == "1B" else 3)
    times = interleave(benchmark, ours, {"cacheless": theirs}, {}, rounds)
    record(
        {
            "kind": "generation",
            "device": device,
            "shape": shape,
            "batch": batch,
            "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
            "positions": positions,
            "seconds": {name: times.median(name) for name in positions},
            "ratio": times.ratio("cacheless"),
            "differ": differ,
            "tokens": tokens["ours"].numel(),
            "rounds": rounds,
        }
    )
