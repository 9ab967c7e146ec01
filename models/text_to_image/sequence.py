"""What a text-to-image sequence is: vocabulary, prompts, and which position holds and sees what.

Method: arXiv 2412.03069, section 3.3. The shapes are plain dataclasses, as
:mod:`tokenflow_ext.models.tokenizer.config` has them for the tokenizer.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tokenflow_ext._deprecated import RenamedAttribute
from tokenflow_ext.models.serialization.config import ConfigError, from_plain, to_plain
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer

from .rope import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("llama", "qwen2", "qwen3")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The MLP's, by the names of ``hidden_act``."""
# Fields of BackboneConfig that a transformers configuration has under the same name; the biases are
# options of some families alone.
_BIASES = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
_SAME: tuple[str, ...] = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "initializer_range", *_BIASES),
)
_LIMIT = 2**31  # of sizes: the product of two is an int64
IMAGE_MARK = "<img>"
"""The string between a prompt and its image; plain text to the text tokenizer."""


class TextTokenizer(Protocol):
    """What is asked of a text tokenizer; those of transformers fit."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class BackboneConfig:
    """The transformer; the names and meanings are transformers' own.

    Attributes:
        family: ``llama``, ``qwen2`` or ``qwen3``.
        head_dim: 0 is ``hidden_size // num_attention_heads``.
        num_key_value_heads: 0 is ``num_attention_heads``.
        rope: how RoPE is scaled.
    """

    family: str = "llama"
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"backbone.family must be one of {', '.join(FAMILIES)}, got {self.family!r}"
            )
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
        ):
            if not 0 < getattr(self, name) < _LIMIT:
                raise ConfigError(
                    f"backbone.{name} must be positive and below 2**31, got {getattr(self, name)!r}"
                )
        if not 0 <= self.initializer_range < math.inf:
            raise ConfigError(
                f"backbone.initializer_range must be 0 or more, got {self.initializer_range}"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups < 0 or heads % (groups or heads):
            raise ConfigError(
                "backbone.num_key_value_heads must divide num_attention_heads, got "
                f"{groups} and {heads}"
            )
        if not self.head_dim and self.hidden_size % heads:
            raise ConfigError(
                "backbone.hidden_size must be a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {heads}"
            )
        if not 0 <= self.head_dim < _LIMIT or self.width_of_head % 2:
            raise ConfigError(f"backbone.head_dim must be even, got {self.width_of_head}")
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"backbone.hidden_act must be one of {', '.join(ACTIVATIONS)}, got "
                f"{self.hidden_act!r}"
            )
        self.rope.check(self.width_of_head)
        for name, families in _BIASES.items():
            if getattr(self, name) and self.family not in families:
                raise ConfigError(f"backbone.{name} is not an option of {self.family}")

    @property
    def width_of_head(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def longest(self) -> int:
        """Places of the longest sequence."""
        return self.rope.reach(self.max_position_embeddings)

    def weights(self, vocab_size: int) -> int:
        """How many numbers the matrices of the layers and the embeddings hold."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        attention = 2 * self.hidden_size * (heads + (groups or heads)) * self.width_of_head
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + vocab_size * self.hidden_size

    def to_transformers(self, vocab_size: int) -> PretrainedConfig:
        """The library's configuration for a vocabulary of this size."""
        from transformers import AutoConfig

        values = to_plain(self)
        del values["rope"]
        family, theta = values.pop("family"), values.pop("rope_theta")
        values["num_key_value_heads"] = self.num_key_value_heads or self.num_attention_heads
        values["head_dim"] = self.width_of_head
        for name, families in _BIASES.items():
            if family not in families:
                del values[name]
        return AutoConfig.for_model(
            family,
            vocab_size=vocab_size,
            rope_parameters={**self.rope.to_transformers(), "rope_theta": theta},
            **values,
        )

    @classmethod
    def from_transformers(cls, config: PretrainedConfig) -> BackboneConfig:
        """The shape of a transformers configuration, of version 5 or 4 (``rope_scaling``).

        Raises:
            ConfigError: another family, something that would change the computation and is not
                supported (sliding windows, attention dropout), or a value of the wrong type: the
                message names it.
        """
        family = getattr(config, "model_type", None)
        if family not in FAMILIES:
            raise ConfigError(
                f"config.model_type must be one of {', '.join(FAMILIES)}, got {family!r}"
            )
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if set(kinds) != {"full_attention"} if kinds else window is not None:
            raise ConfigError(
                f"sliding windows are not supported, got sliding_window {window} and layer_types "
                f"{sorted(set(kinds or ()))}"
            )
        if getattr(config, "attention_dropout", 0.0):
            raise ConfigError(f"attention_dropout is not supported, got {config.attention_dropout}")
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        if not isinstance(rope or {}, dict):
            raise ConfigError(f"rope_parameters must be a mapping, got {rope!r}")
        rope = dict(rope or {})
        theta = rope.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
        rope.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
        values = {name: getattr(config, name, None) for name in _SAME}
        values = {name: value for name, value in values.items() if value is not None}
        scaled = to_plain(RopeConfig.from_transformers(rope))
        return from_plain(
            cls, {**values, "family": family, "rope_theta": theta, "rope": scaled}, "backbone"
        )


def check_header(header: Mapping[str, Any], where: str | Path) -> None:
    """Types and signs of a ``config.json``'s sizes, before transformers computes with them.

    Raises:
        ConfigError: naming the first that is wrong.
    """
    kinds = {"vocab_size": int, **typing.get_type_hints(BackboneConfig)}
    for name in ("vocab_size", *_SAME):
        value, kind = header.get(name), kinds[name]
        if value is None:
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"{where}: {name} must be {kind.__name__}, got {shown(value)}")
        if kind is int and not 0 < value < _LIMIT:
            raise ConfigError(
                f"{where}: {name} must be positive and below 2**31, got {shown(value)}"
            )


@dataclass(frozen=True)
class TextToImageConfig:
    """Everything that decides a :class:`TextToImage`'s shape.

    The vocabulary is the text's ``text_vocab_size`` ids, ``codebook_size`` image tokens, and one
    padding id.

    Attributes:
        backbone: the transformer.
        text_vocab_size: ids of the text tokenizer.
        codebook_size: image tokens, the codes of the image tokenizer.
        feature_dim: channels of the image tokenizer's codes (semantic and pixel).
        scales: sides of the image tokenizer's scales; the first is 1.
        prompt_length: ids that a prompt is cut or padded to, before those of ``<img>``.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    text_vocab_size: int = 32000
    codebook_size: int = 32768
    feature_dim: int = 40
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    prompt_length: int = 128

    def __post_init__(self) -> None:
        for name in ("text_vocab_size", "codebook_size", "feature_dim", "prompt_length"):
            if not 0 < getattr(self, name) < _LIMIT:
                raise ConfigError(
                    f"{name} must be positive and below 2**31, got {getattr(self, name)!r}"
                )
        if not self.scales or self.scales[0] != 1 or min(self.scales) < 1:
            raise ConfigError(
                f"scales must be positive and begin with 1 (the last text token predicts the first "
                f"scale), got {self.scales}"
            )
        if self.image_tokens >= _LIMIT:
            raise ConfigError(f"scales must have fewer than 2**31 tokens, got {self.image_tokens}")

    @classmethod
    def for_tokenizer(
        cls,
        backbone: BackboneConfig,
        tokenizer: TokenFlowTokenizer,
        text_vocab_size: int,
        prompt_length: int = 128,
    ) -> TextToImageConfig:
        """The configuration that fits an image tokenizer."""
        tokenizer.config.need_one_index("text to image")
        quantizer = tokenizer.config.quantizer
        return cls(
            backbone,
            text_vocab_size,
            quantizer.codebook_size,
            sum(tokenizer.config.dims),
            quantizer.scales,
            prompt_length,
        )

    @property
    def vocab_size(self) -> int:
        """Text ids, image tokens and the padding id."""
        return self.text_vocab_size + self.codebook_size + 1

    @property
    def pad_id(self) -> int:
        """The id that prompts are padded with, the last of the vocabulary."""
        return self.vocab_size - 1

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return sum(side * side for side in self.scales)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON or YAML."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextToImageConfig:
        """Inverse of :meth:`to_dict`; fields left out take their defaults.

        Raises:
            ConfigError: an unknown field or a value of the wrong type, named by its path.
        """
        return from_plain(cls, values)


def encode_prompts(
    prompts: Sequence[str], text_tokenizer: TextTokenizer, config: TextToImageConfig
) -> tuple[Tensor, Tensor]:
    """Prompts as the model reads them: ids beginning with bos (where the tokenizer has one), cut or
    left-padded to ``config.prompt_length``, then the ids of ``<img>``.

    Returns:
        (ids [B, T] int64, attention mask [B, T] bool, False where padded).

    Raises:
        ValueError: no prompt.
        ConfigError: a text tokenizer whose ids are not of the configured text vocabulary, or that
            has none for ``<img>``.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a sequence of one string or more, got {prompts!r}")
    first = [] if text_tokenizer.bos_token_id is None else [text_tokenizer.bos_token_id]
    mark = text_tokenizer.encode(IMAGE_MARK, add_special_tokens=False)
    if not mark:
        raise ConfigError(f"the text tokenizer has no ids for {IMAGE_MARK}, where an image begins")
    rows = []
    for prompt in prompts:
        own = first + text_tokenizer.encode(prompt, add_special_tokens=False)
        own = own[: config.prompt_length]
        rows.append([config.pad_id] * (config.prompt_length - len(own)) + own + mark)
    ids = torch.tensor(rows, dtype=torch.int64)
    valid = ids != config.pad_id
    strange = ids[valid & ((ids < 0) | (ids >= config.text_vocab_size))]
    if strange.numel():
        raise ConfigError(
            f"the text tokenizer gave id {int(strange[0])}, the model's text vocabulary has "
            f"{config.text_vocab_size} ids"
        )
    return ids, valid


@dataclass(frozen=True)
class NextScaleSequence:
    """Which position of the sequence holds, sees and predicts what. Training and generation ask
    here.

    The ``text`` prompt positions come first. The last of them, p, predicts scale 0 (one token).
    After it stand the positions of scales 1, 2, ..., each of which predicts its own token. Position
    p + j adds row j of the position embeddings.
    """

    scales: tuple[int, ...]
    text: int

    @property
    def length(self) -> int:
        """Positions in all: the last text position is the first image position too."""
        return self.text - 1 + sum(side * side for side in self.scales)

    places = RenamedAttribute("positions")
    levels = RenamedAttribute("scale_ids")

    def positions(self, scale: int) -> tuple[int, int]:
        """(first, end) of the positions that predict a scale's tokens."""
        first = self.text - 1 + sum(side * side for side in self.scales[:scale])
        return first, first + self.scales[scale] ** 2

    def _of_positions(self, of_text: Sequence[int], of_scale: Sequence[int]) -> Tensor:
        counts = [1] * len(of_text) + [side * side for side in self.scales[1:]]
        values = torch.tensor([*of_text, *of_scale[1:]])
        return values.repeat_interleave(torch.tensor(counts))

    def scale_ids(self) -> Tensor:
        """Row of the scale embeddings that each position adds, [length] (row 1 is unused)."""
        return self._of_positions([0] * self.text, [scale + 1 for scale in range(len(self.scales))])

    def visible(self) -> Tensor:
        """How many leading positions each one sees, [length]: text is causal, a scale's positions
        see all up to their scale's end."""
        ends = [self.positions(scale)[1] for scale in range(len(self.scales))]
        return self._of_positions(range(1, self.text + 1), ends)

    def _keys(self, valid: Tensor) -> Tensor:
        """Which positions are no padding [B, length] from those of the prompt [B, text]."""
        return F.pad(valid, (0, self.length - self.text), value=True)

    def mask(self, valid: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """[B, 1, end - first, end] bool, True where the row's position sees the column's.

        A padded position is seen by itself alone: no row is empty, whose softmax would be NaN.

        Args:
            valid: which prompt positions are no padding, [B, text] bool.
            first, end: the positions that ask; all by default. None of them sees past ``end``.
        """
        end = self.length if end is None else end
        key = torch.arange(end, device=valid.device)
        query = key[first:].unsqueeze(1)
        seen = key < self.visible()[first:end].to(valid.device).unsqueeze(1)
        seen = seen & self._keys(valid)[:, :end].unsqueeze(1)
        return (seen | (key == query)).unsqueeze(1)

    def block_mask(self, valid: Tensor) -> BlockMask:
        """:meth:`mask` for FlexAttention."""
        visible, keys = self.visible().to(valid.device), self._keys(valid)

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ((key < visible[query]) & keys[batch, key]) | (key == query)

        count, length = valid.shape[0], self.length
        return create_block_mask(seen, count, None, length, length, device=valid.device)

    def block_mask_without_padding(self, device: torch.device) -> BlockMask:
        """:meth:`block_mask` of any number of prompts of which no position is padded."""
        visible = self.visible().to(device)

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key < visible[query]

        return create_block_mask(seen, None, None, self.length, self.length, device=device)
