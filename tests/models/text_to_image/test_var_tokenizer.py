"""Text to image over VAR's quantizer, whose f^ is carried at full size with convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext import sample_top_k_top_p
from tokenflow_ext.models import (
    BackboneConfig,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TextToImage,
    TextToImageConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
)

SCALES, CODES, WORDS, TEXT = (1, 2, 3, 4), 32, 40, 6
TOKENS = sum(side * side for side in SCALES)


@pytest.fixture(scope="module")
def model() -> TextToImage:
    torch.manual_seed(0)
    pixel = PixelConfig(channels=8, multipliers=(1, 2, 2), res_blocks=1, z_channels=16, groups=4)
    quantizer = QuantizerConfig(CODES, SCALES, l2_norm=False, kind="var", phi_shared=2)
    semantic = SemanticConfig(tower=TowerConfig("none"))
    tokenizer = TokenFlowTokenizer(TokenizerConfig(16, pixel, semantic, quantizer))
    with torch.no_grad():
        tokenizer.quantizer.codebooks[0].normal_()
    backbone = BackboneConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    config = TextToImageConfig.for_tokenizer(backbone, tokenizer, WORDS, TEXT)
    return TextToImage(config, tokenizer).double().eval()


def f_hat_of(model: TextToImage, tokens: list[Tensor]) -> Tensor:
    """f^ of the first scales' tokens, from the quantizer's weights alone."""
    quantizer = model.tokenizer.quantizer
    side = SCALES[-1]
    total: Tensor | float = 0.0
    for scale, index in enumerate(tokens):
        grid = quantizer.codebooks[0][index].mT.unflatten(2, (SCALES[scale], SCALES[scale]))
        up = F.interpolate(grid, (side, side), mode="bicubic") if side != SCALES[scale] else grid
        # Two convolutions at a quarter and three quarters; the scales lie at thirds.
        phi = quantizer.phis.qresi_ls[0 if scale < 2 else 1]
        total = total + 0.5 * up + 0.5 * F.conv2d(up, phi.weight, phi.bias, padding=1)
    return total


def seen_by(model: TextToImage, tokens: list[Tensor], scale: int) -> Tensor:
    return F.adaptive_avg_pool2d(f_hat_of(model, tokens), SCALES[scale]).flatten(2).mT


def logits_plainly(model: TextToImage, ids: Tensor, inputs: list[Tensor]) -> Tensor:
    """Of the last scale that has inputs, in one run of the whole sequence without a cache."""
    sequence = model.sequence(ids.shape[1])
    first, end = sequence.positions(len(inputs))
    hidden = model.embed_text(ids)
    if inputs:
        scale_ids = sequence.scale_ids()[sequence.text : end]
        image = model.embed_image(torch.cat(inputs, dim=1), 1, scale_ids)
        hidden = torch.cat([hidden, image.expand(len(ids), -1, -1)], dim=1)
    rotary = tuple(part[:, :end] for part in model.rotary(hidden, sequence.length))
    mask = sequence.mask(ids != model.config.pad_id)[:, :, :end, :end]
    return model.image_logits(model.run_layers(hidden, rotary, mask)[:, first:end])


@torch.no_grad()
def test_generation_is_the_cacheless_one(model: TextToImage) -> None:
    ids = torch.randint(WORDS, (2, TEXT), generator=torch.Generator().manual_seed(1))
    top_k, top_p, guidance, seed = (20, 7, 3), (0.9, 0.8, 0.0), 2.5, 11
    found = model.generate_tokens(
        ids[:1], ids[1:], guidance=guidance, top_k=top_k, top_p=top_p, seed=seed
    )
    drawn: list[Tensor] = []
    inputs: list[Tensor] = []
    for scale, side in enumerate(SCALES):
        if scale:
            inputs.append(seen_by(model, drawn, scale))
        for step in range(3 if scale else 1):
            own = list(inputs)
            if step:
                own[-1] = seen_by(model, [*drawn, tokens], scale)  # noqa: F821
            conditional, negative = logits_plainly(model, ids, own).float().split(1)
            first = step * TOKENS + sum(s * s for s in SCALES[:scale])
            tokens = sample_top_k_top_p(
                conditional,
                top_k=top_k[step],
                top_p=top_p[step],
                uncond=negative,
                guidance=guidance * scale / 3,
                seed=torch.full((1, side * side), seed),
                offset=torch.arange(first, first + side * side).unsqueeze(0),
            )
        drawn.append(tokens)
    assert torch.equal(found, torch.cat(drawn, dim=1))
    images, _ = model.tokenizer.decode(found)
    assert images.shape == (1, 3, 16, 16)


def test_training_sees_what_generation_sees_and_learns(model: TextToImage) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(WORDS, (2, TEXT), generator=generator)
    indices = torch.randint(CODES, (2, TOKENS), generator=generator)
    parts = list(indices.split([side * side for side in SCALES], dim=1))
    tokenizer = {name: value.clone() for name, value in model.tokenizer.state_dict().items()}
    weights = [p for name, p in model.named_parameters() if not name.startswith("tokenizer.")]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for step in range(12):
        output = model(ids, indices)
        if step == 0:
            inputs = [seen_by(model, parts[:scale], scale) for scale in range(1, len(SCALES))]
            last = logits_plainly(model, ids, inputs)
            # f^ is of the image tokenizer's precision, float32.
            torch.testing.assert_close(output.logits[:, -16:], last, rtol=0, atol=1e-5)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is None for p in model.tokenizer.parameters())
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, value in model.tokenizer.state_dict().items():
        assert torch.equal(value, tokenizer[name]), name
