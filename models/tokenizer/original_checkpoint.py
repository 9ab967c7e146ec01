"""TokenFlow's released tokenizer checkpoints: recognised, read and written with their own names.

A released file is a torch file with a state dict under ``ema``, ``model`` or ``state_dict``. Its
names differ from ours by a prefix a module (:func:`released_name`); shapes are the same. What one
side has and the other has not:

=====================================  ========================================================
in the file, not in our modules        what becomes of it
=====================================  ========================================================
``quantize.codebook_used``             the last 131,072 codes chosen in the release's training, a
                                       statistic: left aside; zeros, its first state, where it was
                                       never loaded
SigLIP's last layer, ``post_layernorm``  come after ``hidden_states[-2]``, where the features leave:
and ``head``                           left aside; cannot be made up, so that writing without them
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

What is left aside is kept with the tokenizer (``TokenFlowTokenizer.left_aside``) and written back.
Any other name, shape or type is an error that names it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.pretrained import read_torch, write_torch
from tokenflow_ext.models.towers.towers import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD

from .config import TokenizerConfig

CONTAINERS = ("ema", "model", "state_dict")  # the first that a file has is read
USAGE = "quantize.codebook_used"
_USAGE_LENGTH = 131072
_STATISTICS = ("quantizer.usage_ema", "quantizer.codebook_sums")

# Our prefix of the semantic tower and the release's, by the tower's kind.
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
_SHOWN = 8  # names of each kind that a message spells out


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a released file, without the ``module.`` of DistributedDataParallel.

    Tensors of files in torch's present format are mapped, not read: copy them before the file goes.

    Raises:
        CheckpointError: no such file, or one that holds no state dict under a known name.
    """
    path = Path(path)
    # Training scripts store their argparse.Namespace beside the weights: a plain record.
    content = read_torch(path, mmap=True, records=[argparse.Namespace])
    names = list(content) if isinstance(content, dict) else []
    found = next((name for name in CONTAINERS if name in names), None)
    if found is not None:
        content = content[found]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise CheckpointError(
            f"{path} holds no state dict of tensors, by itself or under {', '.join(CONTAINERS)}; "
            f"at its top it has {_listed(str(name) for name in names) or 'no names'}"
        )
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def recognise(
    state: Mapping[str, Tensor], resolution: int | None = None, source: str | Path = "checkpoint"
) -> TokenizerConfig:
    """The configuration of a released state dict, from its names and shapes.

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
            f"{source} is no released tokenizer: it must have exactly one of "
            f"{', '.join(f'{mark} ({name})' for name, mark in marks.items())}, and has "
            f"{' and '.join(found) or 'none'} of them; its names are {_listed(state)}"
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
    """That tokenizers of ``config`` have a released form, whatever their sizes.

    Raises:
        ConfigError: another tower than CLIP's, ViTamin's or SigLIP's, no pixel branch, or pixel
            blocks.
    """
    kind = config.semantic.tower.kind
    if kind not in _TOWERS:
        raise ConfigError(
            f"released tokenizers have a semantic tower {', '.join(_TOWERS)}, this one's kind is "
            f"{kind!r}: save_pretrained saves it"
        )
    if not config.pixel.enabled:
        raise ConfigError(
            "released tokenizers have a pixel branch, this one has none (pixel.enabled is false): "
            "save_pretrained saves it"
        )
    if config.pixel.patch != 1:
        raise ConfigError(
            f"released tokenizers have pixel.patch 1, this one has {config.pixel.patch}: "
            "save_pretrained saves it"
        )


def released_name(name: str, kind: str) -> str | None:
    """The release's name of our weight ``name`` with a tower of ``kind``.

    None for the statistics of our training, which the release does not have.
    """
    if name in _STATISTICS:
        return None
    if name in _CODEBOOKS:
        return _CODEBOOKS[name]
    for ours, theirs in (_TOWERS[kind], ("semantic_decoder.", "decoder_vqkd.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def left_aside(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a released file has and our modules have not."""
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


def from_released(
    state: Mapping[str, Tensor],
    config: TokenizerConfig,
    own: Mapping[str, Tensor],
    source: str | Path = "checkpoint",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A released state dict as a model's own, and what is left aside of it.

    Args:
        state: as :func:`read` gives it.
        config: the model's configuration.
        own: the model's state dict: names, shapes and types that are wanted, and the statistics
            that no released file has.
        source: what messages call ``state``.

    Returns:
        Weights by our names, complete, and the tensors left aside by the release's. The latter may
        be missing in part: nothing here reads them.

    Raises:
        CheckpointError: names that are missing or unknown, shapes or types that are not the
            model's, or another normalisation of the tower's pixels.
        ConfigError: see :func:`check`.
    """
    check(config)
    kind = config.semantic.tower.kind
    names = {name: released_name(name, kind) for name in own}
    wanted = {theirs: own[ours] for ours, theirs in names.items() if theirs is not None}
    pixels = _normalisation(config)
    wanted |= pixels
    aside = left_aside(config)
    faults = []
    if missing := [key for key in wanted if key not in state]:
        faults.append(f"{len(missing)} missing ({_listed(missing)})")
    if unknown := [key for key in state if key not in wanted and key not in aside]:
        faults.append(f"{len(unknown)} unknown ({_listed(unknown)})")
    other = []
    for key, value in state.items():
        if key in wanted:
            like = (tuple(wanted[key].shape), wanted[key].dtype)
        elif key in aside:
            like = (aside[key], torch.float32)
        else:
            continue
        if (tuple(value.shape), value.dtype) != like:
            other.append(f"{key} is {tuple(value.shape)} {value.dtype}, not {like[0]} {like[1]}")
    if other:
        faults.append(f"{len(other)} of another shape or type ({_listed(other)})")
    if faults:
        raise CheckpointError(
            f"{source} does not fit the configuration with a {kind} tower at "
            f"{config.image_size} px: {'; '.join(faults)}"
        )
    for key, value in pixels.items():
        if not torch.allclose(state[key], value, rtol=0.0, atol=1e-6):
            raise CheckpointError(
                f"{source}: {key} is {state[key].flatten().tolist()}, the {kind} tower's pixels "
                f"are normalised with {value.flatten().tolist()}"
            )
    weights = {
        ours: own[ours] if theirs is None else state[theirs] for ours, theirs in names.items()
    }
    return weights, {key: state[key] for key in aside if key in state}


def to_released(
    own: Mapping[str, Tensor], config: TokenizerConfig, aside: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The released form of a model's state dict: the inverse of :func:`from_released`.

    Raises:
        CheckpointError: ``aside`` lacks weights that cannot be made up.
        ConfigError: see :func:`check`.
    """
    check(config)
    kind = config.semantic.tower.kind
    state = {}
    for ours, value in own.items():
        theirs = released_name(ours, kind)
        if theirs is not None:
            state[theirs] = value
    state |= _normalisation(config)
    kept = {USAGE: torch.zeros(_USAGE_LENGTH), **aside}
    if missing := [key for key in left_aside(config) if key not in kept]:
        raise CheckpointError(
            f"{len(missing)} weights of the released form are not in this tokenizer, which was not "
            f"read from a released file ({_listed(missing)}): name one in left_aside_from"
        )
    return state | {key: kept[key] for key in left_aside(config)}


def read_left_aside(path: str | Path, config: TokenizerConfig) -> dict[str, Tensor]:
    """What tokenizers of ``config`` leave aside, from a released file.

    Raises:
        CheckpointError: see :func:`read`; or weights of another shape or type.
    """
    state = read(path)
    found = {}
    for key, shape in left_aside(config).items():
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


def _listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    given = list(names)
    more = f", and {len(given) - _SHOWN} more" if len(given) > _SHOWN else ""
    return ", ".join(given[:_SHOWN]) + more
