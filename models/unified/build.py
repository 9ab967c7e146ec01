"""A text-to-image model that reads pictures too, and its way back."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.text_to_image.model import TextToImage
from tokenflow_ext.models.understanding.build import build_understanding, image_token_id
from tokenflow_ext.models.understanding.vision import TokenFlowVisionModel

from .language_model import TokenFlowForCausalLM, TokenFlowTextConfig, TokenFlowTextModel


def build_unified(
    text_to_image: TextToImage,
    text_tokenizer: PreTrainedTokenizerBase,
    features: str = "last",
    *,
    window: int = 1,
    tokenizer_dtype: str = "float32",
) -> LlavaForConditionalGeneration:
    """A model that draws pictures and answers questions about them, with one transformer, one
    vocabulary and one image tokenizer.

    It is :func:`~tokenflow_ext.models.build_understanding`'s model over the transformer of
    ``text_to_image``: everything of such a model works with it, and its saved folder holds both
    ways. :func:`as_text_to_image` gives the other way, of the same weights. New is the projector of
    what is read alone, with random weights.

    Args:
        text_to_image: taken over, its image tokenizer too.
        text_tokenizer: of its text, with ``<image>`` among the ids of the text.
        features, window, tokenizer_dtype: see :func:`~tokenflow_ext.models.build_understanding`.

    Raises:
        ConfigError: features that the image tokenizer does not have, a context that is shorter than
            a picture, or a text tokenizer whose ``<image>`` is not of the text's vocabulary.
    """
    shape = text_to_image.config
    image_id = image_token_id(text_tokenizer)
    if image_id >= shape.text_vocab_size:
        raise ConfigError(
            f"<image> is id {image_id} of the text tokenizer, and the model's text vocabulary has "
            f"{shape.text_vocab_size} ids: it must be one of them"
        )
    config = TokenFlowTextConfig(
        shape,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )
    return build_understanding(
        TokenFlowForCausalLM(config, text_to_image.model, text_to_image.lm_head),
        text_to_image.tokenizer,
        features,
        text_tokenizer=text_tokenizer,
        window=window,
        tokenizer_dtype=tokenizer_dtype,
    )


def is_unified(model: LlavaForConditionalGeneration) -> bool:
    """Whether a model draws too."""
    return isinstance(model.model.language_model, TokenFlowTextModel)


def as_text_to_image(
    model: LlavaForConditionalGeneration, *, attention: Literal["sdpa", "flex"] = "sdpa"
) -> TextToImage:
    """The text-to-image model of :func:`build_unified`'s: the same weights, not a copy of them.

    Args:
        attention: see :class:`~tokenflow_ext.models.TextToImage`.

    Raises:
        ConfigError: an understanding model over another language model.
    """
    text, tower = model.model.language_model, model.model.vision_tower
    if not isinstance(text, TokenFlowTextModel) or not isinstance(tower, TokenFlowVisionModel):
        raise ConfigError(
            "the model does not draw: its language model is "
            f"{type(text).__name__}, not the transformer of text to image"
        )
    with torch.device("meta"):
        drawing = TextToImage(
            text.config.text_to_image_config, cast(Any, tower.tokenizer), attention=attention
        )
    # The base model has the backbone's modules under the backbone's names.
    drawing.add_module("model", text)
    drawing.add_module("lm_head", model.lm_head)
    return drawing.train(model.training)
