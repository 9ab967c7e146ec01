"""VAR's tokenizer (vae_ch160v4096z32): read and written with its own names (arXiv 2404.02905).

The file is a torch file with a state dict by itself. ``encoder.down.0.block.1`` there is our
``encoder.conv_blocks.0.res.1``. Its decoder counts levels from the finest, and its attention has
queries, keys and values in one convolution ``qkv``.

``quantize.ema_vocab_hit_SV`` holds the running hits of its training. It is unused here, kept with
the tokenizer (``TokenFlowTokenizer.unused_tensors``) and written back, as zeros where it was never
read. The original updates this counter once for each scale, so that later scales hold a tenth of
their hits. Our own statistics are not written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.pretrained import write_torch
from tokenflow_ext.models.serialization.state_dict import compare, listed
from tokenflow_ext.models.towers.config import TowerConfig

from .config import PixelConfig, QuantizerConfig, SemanticConfig, TokenizerConfig

MARK = "encoder.down.0.block.0.conv1.weight"
"""A name that VAR's tokenizer has and others have not."""

CODEBOOK = "quantize.embedding.weight"

USAGE = "quantize.ema_vocab_hit_SV"
SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
"""Its scales, by the side of the images."""

_FACTOR = 16  # pixels a token, per side, at the last scale
_MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}
_PHIS = ("quantizer.phis.", "quantize.quant_resi.")
_PARTS = ("q", "k", "v")


def infer_config(
    state: Mapping[str, Tensor], resolution: int | None = None, source: str | Path = "checkpoint"
) -> TokenizerConfig:
    """The configuration of VAR's state dict, from its names and shapes.

    Args:
        resolution: side of the images, which decides the scales: 256 (None) or 512.
        source: what messages call the state dict.

    Raises:
        CheckpointError: names that are missing, or shapes that are none of such a tokenizer.
        ValueError: another resolution.
    """
    side = 256 if resolution is None else resolution
    if side not in SCALES:
        known = " or ".join(map(str, SCALES))
        raise ValueError(f"resolution must be {known} for {source}, VAR's, got {resolution!r}")
    wanted = {
        "encoder.conv_in.weight": 4,
        "encoder.conv_out.weight": 4,
        "quant_conv.weight": 4,
        CODEBOOK: 2,
    }
    for key, count in wanted.items():
        if key not in state or state[key].dim() != count:
            found = tuple(state[key].shape) if key in state else "missing"
            raise CheckpointError(f"{source} is no tokenizer of VAR's: {key} is {found}")
    channels = state["encoder.conv_in.weight"].shape[0]
    levels: dict[int, int] = {}
    blocks = 0
    for key, value in state.items():
        if match := re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.bias", key):
            levels[int(match[1])] = value.shape[0]
            blocks = max(blocks, int(match[2]) + 1)
    if sorted(levels) != list(range(len(levels))) or not levels:
        raise CheckpointError(f"{source} has levels {sorted(levels)} in its encoder")
    if any(width % channels for width in levels.values()):
        raise CheckpointError(
            f"{source} has levels of {list(levels.values())} channels, which are no multiples of "
            f"{channels}"
        )
    usage = state.get(USAGE)
    if usage is not None and usage.shape[0] != len(SCALES[side]):
        raise CheckpointError(
            f"{source} has {usage.shape[0]} scales, VAR's for {side} px has {len(SCALES[side])}: "
            "give the configuration"
        )
    convolutions = [key for key in state if key.startswith(_PHIS[1]) and key.endswith(".weight")]
    shared = 1 if f"{_PHIS[1]}qresi.weight" in state else len(convolutions)
    in_a_list = any(key.startswith(f"{_PHIS[1]}qresi_ls.") for key in convolutions)
    codes, width = state[CODEBOOK].shape
    return TokenizerConfig(
        image_size=side,
        pixel=PixelConfig(
            channels=channels,
            multipliers=tuple(levels[i] // channels for i in range(len(levels))),
            res_blocks=blocks,
            z_channels=state["encoder.conv_out.weight"].shape[0],
            code_dim=width,
            quant_kernel=state["quant_conv.weight"].shape[-1],
        ),
        semantic=SemanticConfig(TowerConfig("none")),
        quantizer=QuantizerConfig(
            codes,
            SCALES[side],
            l2_norm=False,
            scale_drop=0.0,
            kind="var",
            phi=0.5 if convolutions else 0.0,
            phi_shared=shared if shared == 1 or in_a_list else 0,
        ),
        teacher=TowerConfig("none"),
    )


def check(config: TokenizerConfig) -> None:
    """That tokenizers of ``config`` have VAR's form, whatever their sizes.

    Raises:
        ConfigError: no pixel branch, pixel blocks, or another input size.
    """
    pixel = config.pixel
    if not pixel.enabled:
        raise ConfigError(
            "VAR's tokenizers have a pixel branch, this one has none (pixel.enabled is false): "
            "save_pretrained saves it"
        )
    for name, value, plain in (
        ("patch", pixel.patch, 1),
        ("input_size", pixel.input_size, 0),
        ("decoder_channels", pixel.decoder_channels or pixel.channels, pixel.channels),
        ("decoder_res_blocks", pixel.decoder_res_blocks or pixel.res_blocks, pixel.res_blocks),
    ):
        if value != plain:
            raise ConfigError(
                f"VAR's tokenizers have pixel.{name} {plain}, this one has {value}: "
                "save_pretrained saves it"
            )


def original_name(name: str, levels: int) -> str | None:
    """VAR's name of our weight ``name``, in a tokenizer with so many levels.

    None for the statistics of our training. Of queries, keys and values it is that of the one
    convolution which holds all three.
    """
    if name == "quantizer.codebooks.0":
        return CODEBOOK
    if name.startswith(_PHIS[0]):
        return _PHIS[1] + name.removeprefix(_PHIS[0])
    if name.startswith("quantizer."):
        return None
    name = re.sub(r"\.attn\.(\d+)\.[qkv]\.", r".attn.\1.qkv.", name)
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.(\d)\.(.*)", name):
        rest = re.sub(r"^[qkv]\.", "qkv.", match[3])
        return f"{match[1]}.mid.{_MIDDLE[match[2]]}.{rest}"
    if match := re.fullmatch(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(.*)", name):
        number, rest = int(match[2]), re.sub(r"^res\.", "block.", match[3])
        if match[1] == "encoder":
            return f"encoder.down.{number}.{rest}"
        return f"decoder.up.{levels - 1 - number}.{rest}"
    return name


def _part(name: str) -> int | None:
    """Which third of a joint convolution our weight is: 0 queries, 1 keys, 2 values."""
    match = re.search(r"\.(?:attn|mid)\.\d+\.([qkv])\.", name)
    return _PARTS.index(match[1]) if match else None


def unused_shapes(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what VAR's file has and our modules have not."""
    quantizer = config.quantizer
    return {USAGE: (len(quantizer.scales), quantizer.codebook_size)}


def from_original(
    state: Mapping[str, Tensor],
    config: TokenizerConfig,
    own: Mapping[str, Tensor],
    source: str | Path = "checkpoint",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """VAR's state dict as a model's own, and its unused tensors.

    Arguments, result and errors as of :func:`.original_checkpoint.from_original`.
    """
    check(config)
    levels = len(config.pixel.multipliers)
    names = {name: original_name(name, levels) for name in own}
    wanted: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        if theirs is None:
            continue
        like = own[ours]
        if _part(ours) is not None:
            like = torch.empty(3 * like.shape[0], *like.shape[1:], dtype=like.dtype, device="meta")
        wanted[theirs] = like
    unused = unused_shapes(config)
    if difference := compare(state, wanted, unused):
        raise CheckpointError(f"{source} does not fit the configuration of VAR's: {difference}")
    weights = {}
    for ours, theirs in names.items():
        if theirs is None:
            weights[ours] = own[ours]
            continue
        third = _part(ours)
        weights[ours] = state[theirs] if third is None else state[theirs].chunk(3)[third]
    return weights, {key: state[key] for key in unused if key in state}


def to_original(
    own: Mapping[str, Tensor], config: TokenizerConfig, unused: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """VAR's form of a model's state dict: the inverse of :func:`from_original`.

    Raises:
        CheckpointError: ``unused`` has other tensors than VAR's.
        ConfigError: see :func:`check`.
    """
    check(config)
    shapes = unused_shapes(config)
    if strange := [key for key in unused if key not in shapes]:
        raise CheckpointError(f"VAR's tokenizers have no {listed(strange)}")
    levels = len(config.pixel.multipliers)
    parts: dict[str, list[Tensor]] = {}
    for ours, value in own.items():  # queries, keys and values are in this order
        theirs = original_name(ours, levels)
        if theirs is not None:
            parts.setdefault(theirs, []).append(value)
    state = {
        key: torch.cat(values) if len(values) > 1 else values[0] for key, values in parts.items()
    }
    zeros = {key: torch.zeros(shape) for key, shape in shapes.items()}
    return state | zeros | dict(unused)


def write(path: str | Path, state: Mapping[str, Tensor], overwrite: bool) -> Path:
    """Saves ``state`` by itself; the file is complete before it takes its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_torch(path, content, overwrite)
    return path
