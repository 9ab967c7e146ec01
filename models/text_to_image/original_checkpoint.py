"""TokenFlow's original text-to-image weights: read and written as the original has them.

The original is a folder of transformers: ``config.json`` and the weights, in one safetensors file
or in several with an index. Their names are those of :meth:`TextToImage.state_dict`, with two more:

    image_token_start, image_token_end    first and last id of the image tokens, buffers that may be
                                          there, under any prefix; held against the vocabulary

which are kept, with ``config.json``, and written back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.transformers_folder import (
    HEADER,
    first_line,
    read_header,
    write,
)

from .sequence import TextToImageConfig, check_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["HEADER", "first_line", "parse_header", "read_header", "split_unused", "write"]

_RANGE = ("image_token_start", "image_token_end")
_MODEL_TYPES = ("llava_llama", "llama")


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


__getattr__ = renamed(
    __name__,
    {
        "read": "tokenflow_ext.models.serialization.state_dict:read_state_dict",
        "split_aside": "split_unused",
    },
)
