"""Low-rank adapters (peft) in a language model's linear layers: made, saved, merged.

A checkpoint holds the merged weights, ready for use, and in ``adapter/`` what was trained, in
peft's form. Training is resumed from the latter, over the language model that it started from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tokenflow_ext.errors import MissingPackageError
from tokenflow_ext.models import CheckpointError
from tokenflow_ext.models.serialization.pretrained import read_safetensors, write_safetensors
from tokenflow_ext.train.config import LoraConfig

FOLDER = "adapter"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_BASE = ".base_layer."
_PEFT = "base_model.model."
_LANGUAGE = "model.language_model."
_A, _B = "lora_A.default.", "lora_B.default."


def add(model: LlavaForConditionalGeneration, config: LoraConfig) -> Any:
    """Puts adapters beside every linear layer of the language model; they start as nothing.

    Returns:
        peft's configuration of them.

    Raises:
        MissingPackageError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError("model.lora needs peft: pip install peft") from error
    names = [
        name
        for name, module in model.named_modules()
        if name.startswith(_LANGUAGE) and isinstance(module, nn.Linear)
    ]
    made = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
    )
    # By peft itself: the model's own method asks for the peft of its version of transformers.
    peft.inject_adapter_in_model(made, model)
    return made


def is_adapter(name: str) -> bool:
    """Whether a weight of that name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def merged(weights: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The weights of the model without adapters, theirs added: W + alpha / rank * B A."""
    found = {}
    for name, value in weights.items():
        if is_adapter(name):
            continue
        if _BASE in name and name.endswith("weight"):
            place = name.replace(_BASE + "weight", ".")
            first, second = (weights[f"{place}{part}weight"] for part in (_A, _B))
            value = value + config.alpha / config.rank * (second @ first)
        found[name.replace(_BASE, ".")] = value
    return found


def save(weights: dict[str, Tensor], folder: Path, config: Any) -> None:
    """Writes the adapters among ``weights`` in peft's form, ``config`` being peft's."""
    place = folder / FOLDER
    place.mkdir()
    content = {
        _PEFT + name.replace(".default.", "."): value.contiguous()
        for name, value in weights.items()
        if is_adapter(name)
    }
    write_safetensors(place / _WEIGHTS, content)
    written: dict[str, Any] = config.to_dict()
    plain = {key: _plain(value) for key, value in written.items()}
    (place / _CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, (set, tuple)):
        return sorted(value)
    return (
        value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
    )


def load(folder: Path) -> dict[str, Tensor]:
    """The adapters of a checkpoint, by the names that they have in the model.

    Raises:
        CheckpointError: none there.
    """
    file = folder / FOLDER / _WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {FOLDER}/{_WEIGHTS}: it was trained without")
    found, _ = read_safetensors(file)
    return {
        name.removeprefix(_PEFT).replace("lora_A.", _A).replace("lora_B.", _B): value
        for name, value in found.items()
    }
