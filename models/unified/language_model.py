"""The transformer of text to image as a language model of transformers.

Its layers differ from Llama's (:mod:`tokenflow_ext.models.text_to_image.backbone`), and so none of
transformers' own classes runs them. As a causal language model of theirs it reads and writes text
in everything that is built on one, LLaVA among it. The state dict's names are
:class:`~tokenflow_ext.models.TextToImage`'s, all of them: projector and embeddings of images are
part of it, though text alone does not reach them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tokenflow_ext.models.registration import register
from tokenflow_ext.models.text_to_image.backbone import Backbone, rotary
from tokenflow_ext.models.text_to_image.sequence import TextToImageConfig
from tokenflow_ext.models.understanding.arguments import check_options, without

# What an output has the cache under; it is the argument's name too. 5.24 renamed it.
_CACHE = next(
    field.name
    for field in dataclasses.fields(BaseModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
)


class TokenFlowTextConfig(PreTrainedConfig):
    """Configuration of a :class:`TokenFlowTextModel`.

    Args:
        text_to_image: a :class:`~tokenflow_ext.models.TextToImageConfig` or its plain form; None is
            the default one.
        options: of transformers' configurations. Sizes, under transformers' names, follow from
            ``text_to_image`` and must agree with it.

    Raises:
        ConfigError: values that are unknown or do not go together.
    """

    model_type = "tokenflow_text"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self, text_to_image: TextToImageConfig | dict[str, Any] | None = None, **options: Any
    ) -> None:
        if text_to_image is None:
            text_to_image = TextToImageConfig()
        if not isinstance(text_to_image, TextToImageConfig):
            text_to_image = TextToImageConfig.from_dict(text_to_image)
        shape = text_to_image.backbone
        sizes = {
            "vocab_size": text_to_image.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads or shape.num_attention_heads,
            "head_dim": shape.width_of_head,
            "max_position_embeddings": shape.longest,
            "tie_word_embeddings": False,
        }
        left = without(options, "as text_to_image has it", **sizes)
        self.text_to_image = text_to_image.to_dict()
        for name, value in sizes.items():
            setattr(self, name, value)
        super().__init__(**{**left, "tie_word_embeddings": False})

    @property
    def text_to_image_config(self) -> TextToImageConfig:
        """The shape of everything."""
        return TextToImageConfig.from_dict(self.text_to_image)


class _Pretrained(PreTrainedModel):
    config_class = TokenFlowTextConfig
    config: TokenFlowTextConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True


class TokenFlowTextModel(_Pretrained):
    """The transformer below the head, as a base model of transformers: text, and what stands in its
    place as embeddings, each position seeing those before it.

    Args:
        config: its shape.
        backbone: whose modules are taken over; None makes them, with random weights.
    """

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: TokenFlowTextConfig, backbone: Backbone | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = Backbone(config.text_to_image_config)
        self.shape = config.text_to_image_config.backbone
        for name, child in backbone.named_children():
            self.add_module(name, child)
        self.pos_1LC = backbone.pos_1LC
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The backbone has drawn its weights, and a saved model holds all of them."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of text.

        Args:
            input_ids: [B, n] int64; or ``inputs_embeds`` [B, n, hidden].
            attention_mask: [B, all] with those in the cache, 0 where padded; None has no padding.
            position_ids: [B, n]; None counts from 0, with the padding.
            past_key_values, cache: a cache of transformers that grows with what it is given, by
                the one or the other name of transformers' versions.
            use_cache: makes one where there is none.
            return_dict: False gives a tuple.
            options: what transformers hands on to all parts of a model; they mean nothing here.

        Raises:
            TypeError, ValueError: arguments that do not go together, or an option that is not one
                of those.
        """
        check_options(options)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        count, device = hidden.shape[1], hidden.device
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + count
        if position_ids is None:
            position_ids = torch.arange(past, total, device=device)[None]
        cos, sin = rotary(self.shape, total, hidden)
        angles = cos[0][position_ids], sin[0][position_ids]
        mask = _causal(hidden, past, attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, angles, mask, cache)
        kept: dict[str, Any] = {_CACHE: cache}
        output = BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **kept)
        return output.to_tuple() if return_dict is False else output


def _causal(hidden: Tensor, past: int, valid: Tensor | None) -> Tensor:
    """[B or 1, 1, n, past + n] bool: which position sees which. A padded one is seen by itself
    alone: no row is empty, whose softmax would be NaN."""
    batch, count = hidden.shape[:2]
    key = torch.arange(past + count, device=hidden.device)
    query = key[past:].unsqueeze(1)
    seen = (key <= query)[None]
    if valid is not None:
        if tuple(valid.shape) != (batch, past + count):
            raise ValueError(
                f"attention_mask must be [{batch}, {past + count}], got {tuple(valid.shape)}"
            )
        seen = (seen & valid[:, None].bool()) | (key == query)
    return seen.unsqueeze(1)


class TokenFlowForCausalLM(_Pretrained, GenerationMixin):
    """A text-to-image model as a causal language model of transformers.

    The head is over the whole vocabulary: text, image tokens, padding. What is written is text
    alone (``generation_config.suppress_tokens``).

    Args:
        config: its shape.
        backbone, head: taken over; None makes them, with random weights.
    """

    def __init__(
        self,
        config: TokenFlowTextConfig,
        backbone: Backbone | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        super().__init__(config)
        shape = config.text_to_image_config
        self.model = TokenFlowTextModel(config, backbone)
        if head is None:
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(head.weight, std=shape.backbone.initializer_range)
        self.lm_head = head
        self.post_init()
        if self.generation_config is not None:
            codes = range(shape.text_vocab_size, shape.vocab_size)
            self.generation_config.suppress_tokens = list(codes)

    def _init_weights(self, module: nn.Module) -> None:
        """As of the base model."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, n, vocabulary] of text; arguments as of the base model.

        Args:
            labels: [B, n], -100 where nothing is learned: gives the loss.
            logits_to_keep: so many last positions, or which ones; 0 is all.
        """
        output: Any = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cache=cache,
            **options,
        )
        kept: Any = logits_to_keep
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        passed: dict[str, Any] = {_CACHE: getattr(output, _CACHE)}
        found = CausalLMOutputWithPast(loss=loss, logits=logits, **passed)
        return found.to_tuple() if return_dict is False else found


register()  # where importing this module is what imports transformers
