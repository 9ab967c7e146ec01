"""Understanding models so small that a test makes one in no time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import DIMS, SCALES, image_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tokenflow_ext.models import build_processor, build_understanding
from tokenflow_ext.train.tasks.language import make_text_tokenizer

SENTENCES = (
    "USER: What color is the shape? ASSISTANT: red",
    "Is there a blue triangle in the image? yes no",
    "What shape does the image contain? circle",
)
LANGUAGES = ("llama", "qwen2")


def text_tokenizer(sentences=SENTENCES, size=320):
    text = make_text_tokenizer(sentences, size)
    text.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>"})
    return text


def language_model(kind="llama", rows=0, text=None, seed=1, **changes):
    """A causal language model, far from uniform answers."""
    text = text_tokenizer() if text is None else text
    shape = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": rows or len(text),
        "initializer_range": 0.3,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        **changes,
    }
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()


def understanding(kind="llama", features="last", tokenizer=None, **options):
    """(model, processor)"""
    text = text_tokenizer()
    tokenizer = image_tokenizer() if tokenizer is None else tokenizer
    model = build_understanding(
        language_model(kind, text=text), tokenizer, features, text_tokenizer=text, **options
    )
    return model, build_processor(model, text)


def picture(seed=0, width=23, height=17):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(count, side=16, seed=3):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def question(text="What color is the shape?", images=1, picture=None):
    part = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    content = [part] * images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def rows(maps):
    return maps.flatten(2).transpose(1, 2)


def expected_features(tokenizer, images, features):
    """The features by their definition, in float64, from the tokens."""
    with torch.no_grad():
        if features == "continuous":
            return rows(tokenizer.features(images)).double()
        tokens = tokenizer.encode(images)
        table = torch.cat(
            [F.normalize(group.double(), dim=-1) for group in tokenizer.quantizer.codebooks], dim=1
        )
    maps, start = [], 0
    for side in SCALES:
        part = table[tokens[:, start : start + side * side]]
        maps.append(part.transpose(1, 2).unflatten(2, (side, side)))
        start += side * side

    def total(count, side):
        sized = (F.interpolate(m, (side, side), mode="bicubic") for m in maps[:count])
        return rows(sum(sized))

    if features == "residual":
        return torch.cat([rows(part) for part in maps], dim=1)
    if features == "full":
        return torch.cat([total(i + 1, side) for i, side in enumerate(SCALES)], dim=1)
    last = total(len(SCALES), SCALES[-1])
    return last[..., : DIMS[0]] if features == "semantic" else last
