"""What a configuration may hold: names, ranges of numbers, and what goes together."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenflow_ext.models.losses.discriminators import KINDS as DISCRIMINATORS
from tokenflow_ext.models.losses.tokenizer import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from tokenflow_ext.models.serialization.config import ConfigError, to_plain
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.tokenizer.model import PARTS

if TYPE_CHECKING:
    from .decoder import DecoderConfig
    from .text_to_image import CaptionConfig, TextConfig
    from .tokenizer import TrainConfig
    from .understanding import UnderstandingConfig
    from .var import VarTrainConfig

    AnyConfig: TypeAlias = (
        TrainConfig | DecoderConfig | TextConfig | UnderstandingConfig | VarTrainConfig
    )


def check_run(config: AnyConfig) -> None:
    """What runs of every kind have in common."""
    one_of("optim.schedule", config.optim.schedule, "cosine", "linear", "constant")
    one_of("optim.precision", config.optim.precision, "fp32", "bf16", "fp16")
    check_streams(config.data.streams, "data")
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optim.betas must be two numbers from 0 to below 1, got {shown(betas)}")
    if not config.run or "\0" in config.run:
        raise ConfigError(f"run must name a folder, got {shown(config.run)}")
    _check_ranges(config)


def check_parallel(
    config: TrainConfig | TextConfig | UnderstandingConfig | VarTrainConfig,
) -> None:
    """That the way to split the work is one, and fits the precision."""
    one_of("parallel", config.parallel, "ddp", "fsdp")
    if config.parallel == "fsdp" and config.optim.precision == "fp16":
        raise ConfigError("optim.precision=fp16 is not for parallel=fsdp: use bf16")


def check_captions(section: CaptionConfig, name: str) -> None:
    """That a section of captions, under this name, says which are meant."""
    for key in ("match", "unseen"):
        try:
            re.compile(getattr(section, key))
        except re.error as error:
            raise ConfigError(f"{name}.{key} is no regular expression: {error}") from error
    if section.unseen and section.held_out is not None:
        raise ConfigError(f"{name}.unseen and {name}.held_out are two held-out sets: give one")
    if not section.caption_keys or not all(section.caption_keys):
        raise ConfigError(f"{name}.caption_keys must name keys, got {list(section.caption_keys)}")


def check_streams(streams: tuple[int, ...], name: str) -> None:
    """That a section, under this name, says how shards are dealt out."""
    if len(streams) != 2:
        raise ConfigError(f"{name}.streams must be two numbers, got {shown(streams)}")


def check_pixel_losses(config: TrainConfig | DecoderConfig) -> None:
    """That the losses of images are known."""
    loss = config.loss
    one_of("loss.discriminator", loss.discriminator, *DISCRIMINATORS)
    one_of("loss.discriminator_loss", loss.discriminator_loss, *DISCRIMINATOR_LOSSES)
    one_of("loss.generator_loss", loss.generator_loss, *GENERATOR_LOSSES)


_MANY = 10**12
#: The least and the largest value of every number; of a list, of each of its numbers.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "threads": (0, 4096),
    "resolution": (1, 1 << 14),
    "data.held_out_crops": (1, 1 << 20),
    "data.min_crop": (0, 1),
    "data.max_crop": (1e-3, 1),
    "data.aspect": (1, 100),
    "data.limit": (0, _MANY),
    "data.evaluated": (1, 1 << 20),
    "data.length": (1, 1 << 24),
    "data.drop": (0, 1),
    "data.truncate": (0, 1),
    "data.streams": (1, 1 << 16),
    "data.workers": (0, 1024),
    "data.cache": (0, 1 << 24),
    "data.resize": (1, 16),
    "optim.steps": (1, _MANY),
    "optim.batch": (1, 1 << 20),
    "optim.accumulate": (1, 1 << 20),
    "optim.lr": (0, math.inf),
    "optim.discriminator_lr": (0, math.inf),
    "optim.betas": (0, 1),
    "optim.weight_decay": (0, math.inf),
    "optim.warmup": (0, _MANY),
    "optim.warmup_lr": (0, 1),
    "optim.flat": (0, 0.999),
    "optim.final_lr": (0, math.inf),
    "optim.max_grad_norm": (0, math.inf),
    "optim.ema_decay": (0, 1),
    **{f"optim.lr_scale.{part}": (0, math.inf) for part in PARTS},
    "loss.semantic": (0, math.inf),
    "loss.vq": (0, math.inf),
    "loss.pixel": (0, math.inf),
    "loss.perceptual": (0, math.inf),
    "loss.gan": (0, math.inf),
    "loss.gan_start": (0, _MANY),
    "loss.discriminator_channels": (1, 1 << 12),
    "codebook.kmeans_batches": (0, 1 << 20),
    "codebook.kmeans_iterations": (1, 1 << 20),
    "codebook.restart_every": (0, _MANY),
    "codebook.restart_until": (0, 1),
    "codebook.restart_threshold": (0, math.inf),
    "model.classes": (0, 1 << 24),
    "model.prompt_length": (1, 1 << 16),
    "model.lora.rank": (0, 1 << 16),
    "model.lora.alpha": (1, 1 << 20),
    "model.lora.dropout": (0, 1),
    "model.vocabulary": (257, 1 << 24),  # every byte, and bos
    "sample.guidance": (0, math.inf),
    "sample.top_k": (0, 2**31 - 1),
    "sample.top_p": (0, 1),
    "sample.min_p": (0, 1),
    "sample.temperature": (1e-6, math.inf),
    **{f"output.{every}_every": (1, _MANY) for every in ("log", "eval", "picture", "checkpoint")},
    "output.keep": (1, 1 << 20),
    "output.pictures": (1, 1 << 12),
}


# A second section of captions has the ranges of the first.
RANGES |= {
    key.replace("data.", "drawing.", 1): bounds
    for key, bounds in RANGES.items()
    if key.startswith("data.")
}


def leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys: ``{"optim.lr": 0.1}``."""
    if not isinstance(values, dict):
        return {path: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{path}.{key}" if path else key)
    return found


def _check_ranges(config: AnyConfig) -> None:
    for key, given in leaves(to_plain(config)).items():
        low, high = RANGES.get(key, (-math.inf, math.inf))
        for value in given if isinstance(given, list) else [given]:
            if key not in RANGES or value is None or low <= value <= high:
                continue
            wanted = f"{low} or more" if high in (_MANY, math.inf) else f"within [{low}, {high}]"
            raise ConfigError(f"{key} must be {wanted}, got {shown(value)}")


def one_of(key: str, value: str, *allowed: str) -> None:
    """That a value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {shown(value)}")
