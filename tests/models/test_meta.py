"""Modules made on the meta device are whole after ``to_empty`` and every ``reset_parameters``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

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
from tokenflow_ext.models.losses.discriminators import KINDS, build_discriminator
from tokenflow_ext.models.towers.towers import build_tower

TOWERS = {
    "clip": TowerConfig("clip", 32, 8, width=16, depth=2, heads=2, mlp_width=24, projection=12),
    "siglip": TowerConfig("siglip", 32, 8, width=16, depth=2, heads=2, mlp_width=24),
    "efficientnet_lite0": TokenizerConfig.preset("tiny").teacher,
}


def tokenizer() -> TokenFlowTokenizer:
    semantic = SemanticConfig(
        TOWERS["siglip"], decoder_width=24, decoder_depth=1, decoder_heads=4, decoder_grid=4
    )
    pixel = PixelConfig(channels=8, multipliers=(1, 1, 1, 2), res_blocks=1, z_channels=8, groups=4)
    quantizer = QuantizerConfig(codebook_size=16, scales=(1, 2, 4))
    return TokenFlowTokenizer(TokenizerConfig(32, pixel, semantic, quantizer))


def text_to_image() -> TextToImage:
    image_tokenizer = tokenizer()
    backbone = BackboneConfig(
        "qwen2",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    config = TextToImageConfig.for_tokenizer(backbone, image_tokenizer, 20, 5)
    return TextToImage(config, image_tokenizer)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda config=config: build_tower(config) for kind, config in TOWERS.items()},
    **{kind: lambda kind=kind: build_discriminator(kind, 16, 8) for kind in KINDS},
    "tokenizer": tokenizer,
    "text to image": text_to_image,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_reset_parameters_fills_what_to_empty_made(name: str) -> None:
    with torch.device("meta"):
        module = BUILDERS[name]()
    module.to_empty(device="cpu")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    with torch.no_grad():
        for tensor in floating.values():
            tensor.fill_(float("nan"))
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert [name for name, tensor in floating.items() if not bool(tensor.isfinite().all())] == []
    fixed = dict(BUILDERS[name]().named_buffers())
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, fixed[name], msg=name)
