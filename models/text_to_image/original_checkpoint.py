"""TokenFlow's original text-to-image weights: read and written as the original has them.

The original is a folder of transformers: ``config.json`` and the weights, in one safetensors file
or in several with an index. Their names are those of :meth:`TextToImage.state_dict`, with two more:

    image_token_start, image_token_end    first and last id of the image tokens, buffers that may be
                                          there, under any prefix; held against the vocabulary

which are kept, with ``config.json``, and written back.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.files import (
    OutputError,
    brief,
    cannot_write,
    read_json,
)

from .sequence import TextToImageConfig, check_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEADER = "config.json"
_RANGE = ("image_token_start", "image_token_end")
_MODEL_TYPES = ("llava_llama", "llama")


def read_header(path: str | Path) -> dict[str, Any]:
    """``config.json`` in the folder, or beside the file.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / HEADER
    if not file.exists():
        raise CheckpointError(f"{file} is missing: give llama_config")
    header = read_json(file, CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} must hold a mapping, got {type(header).__name__}")
    return header


def parse_header(header: Mapping[str, Any]) -> PretrainedConfig:
    """The backbone's configuration in an original ``config.json``.

    Raises:
        ConfigError: of another model than a Llama, or not one that transformers can make.
    """
    from transformers import LlamaConfig

    values = dict(header)
    family = values.pop("model_type", None)
    if family not in _MODEL_TYPES:
        raise ConfigError(f"model_type must be one of {', '.join(_MODEL_TYPES)}, got {family!r}")
    check_header(header, HEADER)
    try:
        return LlamaConfig(**values)
    except Exception as error:  # of many types, by the version of transformers
        raise ConfigError(f"no configuration of a Llama: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error of transformers says at first.

    What follows is advice to run the code of the files, or to go to the network.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return "it asks for code of its own, which is not run"
    if isinstance(error, KeyError):
        return f"it has no {brief(error)}"
    if "weights_only" in text:
        return brief(error)
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return brief(" ".join(lines[: 2 if lines[0].rstrip().endswith(":") else 1]))


def split_unused(
    state: Mapping[str, Tensor], config: TextToImageConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, and the buffers with the image tokens' ids.

    Raises:
        CheckpointError: ids that are not the vocabulary's.
    """
    unused = {key: value for key, value in state.items() if key.rpartition(".")[2] in _RANGE}
    for key, value in unused.items():
        _check_range(key, value, config)
    return {key: value for key, value in state.items() if key not in unused}, unused


def _check_range(key: str, value: Tensor, config: TextToImageConfig) -> None:
    if value.numel() != 1:
        raise CheckpointError(f"{key} must be one id, got {tuple(value.shape)}")
    if value.is_meta:
        return
    first, last = config.text_vocab_size, config.pad_id - 1
    if int(value) != (first if key.endswith("start") else last):
        raise CheckpointError(
            f"{key} is {int(value)}, the vocabulary has its image tokens at {first} to {last}"
        )


def write(
    folder: str | Path,
    state: Mapping[str, Tensor],
    header: Mapping[str, Any],
    shard: str,
    overwrite: bool,
) -> Path:
    """Saves a folder as :func:`.read_state_dict` and transformers read it. ``config.json`` comes
    last, and each file is complete before it takes its name.

    Args:
        shard: the largest file, such as ``5GB``; what does not fit into one goes into several.
        overwrite: whether to replace a model that is there.

    Raises:
        OutputError: a model is there, or a place that cannot be written to, or a full disk.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    folder = Path(folder)
    old = [file for name in (HEADER, "model*.safetensors*") for file in folder.glob(name)]
    if old and not overwrite:
        raise OutputError(f"{old[0]} is there already: nothing is written over it")
    content = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            save_torch_state_dict(content, partial, max_shard_size=shard)
            text = json.dumps(dict(header), indent=2) + "\n"
            (Path(partial) / HEADER).write_text(text, encoding="utf-8")
            for file in old:  # of an earlier model, in other shards
                file.unlink()
            for file in sorted(Path(partial).iterdir(), key=_weights_index_header):
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    return folder


def _weights_index_header(file: Path) -> tuple[bool, bool]:
    return file.suffix == ".json", file.name == HEADER


__getattr__ = renamed(
    __name__,
    {
        "read": "tokenflow_ext.models.serialization.state_dict:read_state_dict",
        "split_aside": "split_unused",
    },
)
