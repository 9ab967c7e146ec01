"""VAR models so small that a test makes one in no time."""

from __future__ import annotations

import torch

from tokenflow_ext.models import (
    VAR,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
    VarConfig,
)

SCALES, CODES, CLASSES = (1, 2, 3, 4), 32, 5
TOKENS = sum(side * side for side in SCALES)
WIDTH = 8  # channels of a code


def var_tokenizer(seed=0):
    """VAR's quantizer with two shared convolutions."""
    torch.manual_seed(seed)
    pixel = PixelConfig(channels=8, multipliers=(1, 2, 2), res_blocks=1, z_channels=16, groups=4)
    quantizer = QuantizerConfig(CODES, SCALES, l2_norm=False, kind="var", phi_shared=2)
    semantic = SemanticConfig(tower=TowerConfig("none"))
    tokenizer = TokenFlowTokenizer(TokenizerConfig(16, pixel, semantic, quantizer))
    with torch.no_grad():
        tokenizer.quantizer.codebooks[0].normal_()
    return tokenizer


def build(dtype=torch.float64, tokenizer=None, seed=1, **changes):
    """A model whose every weight says something."""
    tokenizer = var_tokenizer() if tokenizer is None else tokenizer
    shape = {"depth": 2, "width": 32, "heads": 4, "classes": CLASSES, **changes}
    model = VAR(VarConfig.for_tokenizer(tokenizer, **shape), tokenizer)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale_mul" in name:
                parameter.uniform_(0.5, 6.0)  # also above the limit
            else:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def tokens(count, seed=2, model=None):
    codes = CODES if model is None else model.config.codebook_size
    length = TOKENS if model is None else model.config.image_tokens
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(codes, (count, length), generator=generator)
