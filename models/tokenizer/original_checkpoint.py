"""TokenFlow's original tokenizer checkpoints: read and written with their own names.

An original checkpoint is a torch file with a state dict under ``ema``, ``model`` or ``state_dict``.
Its names differ from ours by a prefix a module (:func:`original_name`), shapes are the same. What
one side has and the other has not:

=====================================  ========================================================
in the file, not in our modules        what becomes of it
=====================================  ========================================================
``quantize.codebook_used``             the last 131,072 codes chosen in the original training, a
                                       statistic: unused; zeros, its first state, where it was
                                       never loaded
SigLIP's last layer, ``post_layernorm``  come after ``hidden_states[-2]``, where the features leave:
and ``head``                           unused; cannot be made up, so that writing without them
                                       is refused
``scaling_layer.shift``, ``.scale``    the tower's mean and deviation, constants here: compared on
                                       reading (another value would change every token), written
                                       from the constants
=====================================  ========================================================

=====================================  ========================================================
in our modules, not in the file        what becomes of it
=====================================  ========================================================
``quantizer.usage_ema``,               statistics of our training: they start from zero after
``quantizer.codebook_sums``            reading, and are not written
=====================================  ========================================================

Unused tensors are kept with the tokenizer (``TokenFlowTokenizer.unused_tensors``) and written back.
Any other name, shape or type is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.pretrained import write_torch
from tokenflow_ext.models.serialization.state_dict import (
    compare,
    listed,
    read_state_dict,
    widened,
)
from tokenflow_ext.models.towers.towers import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD

from .config import TokenizerConfig

USAGE = "quantize.codebook_used"
_USAGE_LENGTH = 131072
_STATISTICS = ("quantizer.usage_ema", "quantizer.codebook_sums")

# Our prefix of the semantic tower and the original's, by the tower's kind.
_TOWERS = {
    "clip": ("semantic_encoder.", "encoder_vqkd."),
    "vitamin": ("semantic_encoder.trunk.", "encoder_vqkd."),
    "siglip": ("semantic_encoder.", "encoder_vqkd.vision_model."),
}
_PIXELS = {"vitamin": (CLIP_MEAN, CLIP_STD), "siglip": (SIGLIP_MEAN, SIGLIP_STD)}
_CODEBOOKS = {
    "quantizer.codebooks.0": "quantize.embedding_vqkd.weight",
    "quantizer.codebooks.1": "quantize.embedding_vqgan.weight",
}

# A weight that one variant's tower alone has, and the sides it can be asked for (its own first).
_VARIANTS = {
    "B": ("encoder_vqkd.class_embedding", {224: "B", 256: "B-256"}),
    "L": ("encoder_vqkd.patch_embed.backbone.stem.conv1.weight", {256: "L"}),
    "XL": ("encoder_vqkd.vision_model.embeddings.patch_embedding.weight", {384: "XL"}),
}
_DECODER = "decoder.conv_in.weight"


def infer_config(
    state: Mapping[str, Tensor], resolution: int | None = None, source: str | Path = "checkpoint"
) -> TokenizerConfig:
    """The configuration of an original state dict, from its names and shapes.

    Args:
        resolution: side of the images, None for the variant's own: 224 for B, which can be read for
            256 too (interpolated positions, nine scales), 256 for L, 384 for XL.
        source: what messages call the state dict.

    Raises:
        CheckpointError: the names of no variant, or of several.
        ValueError: a resolution that the variant was not made for.
    """
    marks = {name: mark for name, (mark, _) in _VARIANTS.items()}
    found = [name for name, mark in marks.items() if mark in state]
    if len(found) != 1:
        raise CheckpointError(
            f"{source} is no original tokenizer: it must have exactly one of "
            f"{', '.join(f'{mark} ({name})' for name, mark in marks.items())}, and has "
            f"{' and '.join(found) or 'none'} of them; its names are {listed(state)}"
        )
    presets = _VARIANTS[found[0]][1]
    side = next(iter(presets)) if resolution is None else resolution
    if side not in presets:
        raise ValueError(
            f"resolution must be {' or '.join(map(str, presets))} for {source}, a tokenizer "
            f"{found[0]}, got {resolution!r}"
        )
    config = TokenizerConfig.preset(presets[side])
    enhanced = config.with_enhanced_decoder()
    width = enhanced.pixel.decoder_channels * enhanced.pixel.multipliers[-1]
    if _DECODER in state and state[_DECODER].shape[:1] == (width,):
        return enhanced
    return config


def check(config: TokenizerConfig) -> None:
    """That tokenizers of ``config`` have an original form, whatever their sizes.

    Raises:
        ConfigError: another tower than CLIP's, ViTamin's or SigLIP's, no pixel branch, or pixel
            blocks.
    """
    kind = config.semantic.tower.kind
    if kind not in _TOWERS:
        raise ConfigError(
            f"original tokenizers have a semantic tower {', '.join(_TOWERS)}, this one's kind is "
            f"{kind!r}: save_pretrained saves it"
        )
    if not config.pixel.enabled:
        raise ConfigError(
            "original tokenizers have a pixel branch, this one has none (pixel.enabled is false): "
            "save_pretrained saves it"
        )
    if config.pixel.patch != 1:
        raise ConfigError(
            f"original tokenizers have pixel.patch 1, this one has {config.pixel.patch}: "
            "save_pretrained saves it"
        )


def original_name(name: str, kind: str) -> str | None:
    """The original name of our weight ``name`` with a tower of ``kind``.

    None for the statistics of our training, which the original does not have.
    """
    if name in _STATISTICS:
        return None
    if name in _CODEBOOKS:
        return _CODEBOOKS[name]
    for ours, theirs in (_TOWERS[kind], ("semantic_decoder.", "decoder_vqkd.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def unused_shapes(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what an original checkpoint has and our modules have not."""
    shapes: dict[str, tuple[int, ...]] = {USAGE: (_USAGE_LENGTH,)}
    tower = config.semantic.tower
    if tower.kind != "siglip":
        return shapes
    width, inner = tower.width, tower.mlp_width
    norm: dict[str, tuple[int, ...]] = {"weight": (width,), "bias": (width,)}
    square: dict[str, tuple[int, ...]] = {"weight": (width, width), "bias": (width,)}
    mlp = {
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    stem = _TOWERS["siglip"][1]
    layer = f"{stem}encoder.layers.{tower.depth - 1}."
    layers: tuple[tuple[str, dict[str, tuple[int, ...]]], ...] = (
        *((f"{layer}self_attn.{name}_proj", square) for name in ("q", "k", "v", "out")),
        *((f"{layer}layer_norm{i}", norm) for i in (1, 2)),
        (f"{stem}post_layernorm", norm),
        (f"{stem}head.attention.out_proj", square),
        (f"{stem}head.layernorm", norm),
    )
    for part, sizes in layers:
        shapes |= {f"{part}.{name}": size for name, size in sizes.items()}
    for part in (layer, f"{stem}head."):
        shapes |= {part + name: size for name, size in mlp.items()}
    shapes[f"{stem}head.probe"] = (1, 1, width)
    shapes[f"{stem}head.attention.in_proj_weight"] = (3 * width, width)
    shapes[f"{stem}head.attention.in_proj_bias"] = (3 * width,)
    return shapes


def from_original(
    state: Mapping[str, Tensor],
    config: TokenizerConfig,
    own: Mapping[str, Tensor],
    source: str | Path = "checkpoint",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An original state dict as a model's own, and its unused tensors.

    Args:
        state: of :func:`.read_state_dict`.
        config: the model's configuration.
        own: the model's state dict: names, shapes and types that are wanted, and the statistics
            that no original checkpoint has.
        source: what messages call ``state``.

    Returns:
        Weights by our names, complete, and the unused tensors by the original's. The latter may
        be missing in part: nothing here reads them.

    Raises:
        CheckpointError: names that are missing or unknown, shapes or types that are not the
            model's, or another normalisation of the tower's pixels.
        ConfigError: see :func:`check`.
    """
    check(config)
    kind = config.semantic.tower.kind
    names = {name: original_name(name, kind) for name in own}
    wanted = {theirs: own[ours] for ours, theirs in names.items() if theirs is not None}
    pixels = _normalisation(config)
    wanted |= pixels
    unused = unused_shapes(config)
    difference = compare(state, wanted, unused)
    if difference:
        raise CheckpointError(
            f"{source} does not fit the configuration with a {kind} tower at "
            f"{config.image_size} px: {difference}"
        )
    for key, value in pixels.items():
        if not state[key].is_meta and not _same_pixels(state[key], value):
            raise CheckpointError(
                f"{source}: {key} is {state[key].flatten().tolist()}, the {kind} tower's pixels "
                f"are normalised with {value.flatten().tolist()}"
            )
    weights = {
        ours: own[ours] if theirs is None else state[theirs] for ours, theirs in names.items()
    }
    return weights, {key: state[key] for key in unused if key in state}


def _same_pixels(found: Tensor, value: Tensor) -> bool:
    """Whether a normalisation is the wanted one, or was stored in half precision once."""
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return any(torch.allclose(found, value.to(k).float(), rtol=0.0, atol=1e-6) for k in kinds)


def to_original(
    own: Mapping[str, Tensor], config: TokenizerConfig, unused: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The original form of a model's state dict: the inverse of :func:`from_original`.

    Raises:
        CheckpointError: ``unused`` lacks weights that cannot be made up.
        ConfigError: see :func:`check`.
    """
    check(config)
    kind = config.semantic.tower.kind
    state = {}
    for ours, value in own.items():
        theirs = original_name(ours, kind)
        if theirs is not None:
            state[theirs] = value
    state |= _normalisation(config)
    kept = {USAGE: torch.zeros(_USAGE_LENGTH), **unused}
    if missing := [key for key in unused_shapes(config) if key not in kept]:
        raise CheckpointError(
            f"{len(missing)} weights of the original form are not in this tokenizer, which was not "
            f"read from an original checkpoint ({listed(missing)}): name one in unused_from"
        )
    return state | {key: kept[key] for key in unused_shapes(config)}


def read_unused(
    path: str | Path, config: TokenizerConfig | Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """What tokenizers of ``config`` have no use for, from an original checkpoint.

    Args:
        config: or names and shapes of what they have no use for.

    Raises:
        CheckpointError: see :func:`.read_state_dict`; or weights of another shape or type.
    """
    state = widened(read_state_dict(path))
    found = {}
    shapes = unused_shapes(config) if isinstance(config, TokenizerConfig) else config
    for key, shape in shapes.items():
        if key not in state:
            continue
        value = state[key]
        if (tuple(value.shape), value.dtype) != (shape, torch.float32):
            raise CheckpointError(
                f"{path}: {key} is {tuple(value.shape)} {value.dtype}, not {shape} torch.float32"
            )
        found[key] = value.clone()
    return found


def write(path: str | Path, state: Mapping[str, Tensor], overwrite: bool) -> Path:
    """Saves ``state`` under ``model``; the file is complete before it takes its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_torch(path, {"model": content}, overwrite)
    return path


def _normalisation(config: TokenizerConfig) -> dict[str, Tensor]:
    kind = config.semantic.tower.kind
    if kind not in _PIXELS:
        return {}
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in _PIXELS[kind])
    return {"scaling_layer.shift": mean, "scaling_layer.scale": deviation}


__getattr__ = renamed(
    __name__,
    {
        "CONTAINERS": "tokenflow_ext.models.serialization.state_dict:CONTAINERS",
        "read": "tokenflow_ext.models.serialization.state_dict:read_state_dict",
        "recognise": "infer_config",
        "released_name": "original_name",
        "left_aside": "unused_shapes",
        "from_released": "from_original",
        "to_released": "to_original",
        "read_left_aside": "read_unused",
    },
)
