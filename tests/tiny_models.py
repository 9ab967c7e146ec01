"""Models so small that a test makes one in no time, and prompts and pictures for them."""

from __future__ import annotations

import torch

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
from tokenflow_ext.models.tokenizer.config import FamilyConfig

SCALES = (1, 2, 3, 4)
CODES = 48
WORDS = 50
#: Quantizers of the family, as `image_tokenizer` takes them.
FAMILY = {
    "groups": {"dims": (8, 8), "codes": 16, "family": {"group_dim": 4, "metric": "dot"}},
    "lengths": {"codes": 16, "l2_norm": False, "family": {"metric": "dot"}},
    "rounds": {
        "scales": (4,),
        "codes": 16,
        "l2_norm": False,
        "codebook_update": "ema",
        "family": {"depth": 3, "errors": "running", "straight_through": "identity"},
    },
    "shared": {"codes": 24, "weights": (1.0, 2.0), "family": {"index": "shared", "depth": 2}},
    "projected": {"codes": 16, "scales": (2, 4), "family": {"code": "projected"}},
    "convolutions": {
        "codes": 16,
        "family": {"convolutions": True, "errors": "running", "straight_through": "identity"},
    },
    "signs": {"family": {"code": "signs"}},
    "unit signs": {
        "dims": (6, 6),
        "scales": (4,),
        "family": {"code": "signs", "spherical": True, "group_dim": 3, "depth": 2},
    },
    "levels": {
        "dims": (3, 3),
        "scales": (2, 4),
        "family": {"code": "levels", "levels": (5, 4, 3), "depth": 2},
    },
}
TEXT = 9
DIMS = (6, 8)
FAMILIES = ("llama", "qwen2", "qwen3")


def image_tokenizer(scales=SCALES, codes=CODES, seed=0, dims=DIMS, pixel=True, **quantizer):
    """A tokenizer of both branches, or of the semantic one alone.

    Args:
        dims: channels of the semantic and of the pixel codes.
        pixel: whether there is a pixel branch.
        quantizer: of ``QuantizerConfig``, beside codes and scales.
    """
    torch.manual_seed(seed)
    tower = TowerConfig("clip", 4 * scales[-1], 4, width=16, depth=1, heads=2, mlp_width=32)
    semantic = SemanticConfig(
        tower,
        code_dim=dims[0],
        decoder_width=24,
        decoder_depth=1,
        decoder_heads=4,
        decoder_grid=scales[-1],
    )
    branch = PixelConfig(
        enabled=pixel,
        code_dim=dims[1],
        channels=8,
        multipliers=(1, 2, 2),
        res_blocks=1,
        z_channels=16,
        groups=4,
    )
    shape = QuantizerConfig(codebook_size=codes, scales=scales, **quantizer)
    model = TokenFlowTokenizer(TokenizerConfig(4 * scales[-1], branch, semantic, shape))
    with torch.no_grad():  # rows that are not of unit length, as trained ones
        for group in model.quantizer.codebooks:
            group.mul_(0.5 + torch.rand(codes, 1))
    return model


def family_tokenizer(kind, **changes):
    """A tokenizer of one of the kinds of ``FAMILY``."""
    options = {**FAMILY[kind], **changes}
    family = FamilyConfig(**options.pop("family"))
    return image_tokenizer(kind="family", family=family, scale_drop=0.0, **options).eval()


def backbone(family="llama", **changes):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # far from uniform logits
    }
    return BackboneConfig(family, **{**shape, **changes})


def build(family="llama", dtype=torch.float64, tokenizer=None, **changes):
    tokenizer = image_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(1)
    shape = backbone(family, **changes)
    model = TextToImage(TextToImageConfig.for_tokenizer(shape, tokenizer, WORDS, 7), tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def prompts(model, lengths, seed=2, text=TEXT):
    """Left-padded random ids [B, text]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (len(lengths), text), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        row[: text - length] = model.config.pad_id
    return ids


def pictures(model, count, seed=3):
    shape = (count, model.config.image_tokens)
    return torch.randint(
        model.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed)
    )


def original_shapes(vocab, hidden, mlp, layers, heads, codes, scales):
    """Keys of the original weights, as their description lists them."""
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "model.mm_projector.0.weight": (hidden, codes),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
        "model.lvl_embed.weight": (len(scales) + 1, hidden),
        "model.pos_1LC": (sum(s * s for s in scales), hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("query", "key"):
            shapes[f"{prefix}self_attn.qknorm.{name}_norm.weight"] = (hidden // heads,)
        shapes[prefix + "mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (mlp, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, mlp)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    return shapes


def llama_config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5, **changes)


TINY = {
    "vocab_size": WORDS + CODES + 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_original():
    shapes = original_shapes(WORDS + CODES + 1, 32, 40, 2, 4, sum(DIMS), SCALES)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return state, llama_config(**TINY)
