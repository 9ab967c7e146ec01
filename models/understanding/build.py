"""Understanding models on transformers' LLaVA: any causal language model over any tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenflow_ext.errors import WeightsError
from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.serialization.transformers_folder import FILES_ALONE, first_line
from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer

from . import chat
from .pixels import TokenFlowImageProcessor
from .vision import TokenFlowVisionConfig, TokenFlowVisionModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def build_understanding(
    language_model: str | Path | PreTrainedModel,
    tokenizer: TokenFlowTokenizer,
    features: str = "last",
    *,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    window: int = 1,
    tokenizer_dtype: str = "float32",
) -> LlavaForConditionalGeneration:
    """A model that answers questions about pictures: ``tokenizer``'s features, a projector with
    random weights, and ``language_model`` (arXiv 2412.03069, section 3.4).

    It is transformers' own LLaVA: ``generate``, ``save_pretrained`` and what else works with that
    works with this. It takes ``config.image_token_id`` once for each row of the features, which
    :func:`build_processor`'s processor writes.

    Args:
        language_model: a causal language model of transformers, which is taken over (its embeddings
            get one row more where the text tokenizer has no place for ``<image>``), or a folder
            with one.
        tokenizer: the image tokenizer, taken over and frozen.
        features: what the language model reads, one of
            :data:`~tokenflow_ext.models.understanding.names.FEATURES`.
        text_tokenizer: of the language model; None takes the one in the folder. A model given
            without one gets ``<image>`` as a new last id.
        window, tokenizer_dtype: see :class:`.vision.TokenFlowVisionConfig`.

    Raises:
        ConfigError: features that the tokenizer does not have, a language model that is none or
            whose context is shorter than a picture, or a head with a bias.
        WeightsError: no language model in the folder.
    """
    vision = TokenFlowVisionConfig(
        tokenizer.config, features, window=window, tokenizer_dtype=tokenizer_dtype
    )
    if not isinstance(language_model, PreTrainedModel):
        folder = language_model
        try:
            if text_tokenizer is None:
                text_tokenizer = AutoTokenizer.from_pretrained(folder, **FILES_ALONE)
            language_model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", **FILES_ALONE
            )
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"no language model at {folder}: wanted is a folder of transformers (config.json, "
                f"model.safetensors, tokenizer.json); nothing is fetched ({first_line(error)})"
            ) from error
    assert isinstance(language_model, PreTrainedModel)
    head = language_model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(
            f"{type(language_model).__name__} is no causal language model with a head without a "
            "bias, as LLaVA's is"
        )
    config: PretrainedConfig = language_model.config
    reach = getattr(config, "max_position_embeddings", None)
    if reach is not None and reach <= vision.visual_tokens:
        raise ConfigError(
            f"a picture is {vision.visual_tokens} tokens, and the language model has a context of "
            f"{reach}"
        )
    image_id = config.vocab_size if text_tokenizer is None else image_token_id(text_tokenizer)
    if image_id >= config.vocab_size:
        language_model.resize_token_embeddings(image_id + 1, mean_resizing=False)
    if config.tie_word_embeddings and not hasattr(language_model.base_model, "embed_tokens"):
        # transformers' LLaVA looks for the other end of the tie by that name: two weights then.
        config.tie_word_embeddings = False
        head = language_model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    model = assemble(vision, config, image_id)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.model.vision_tower = TokenFlowVisionModel(vision, tokenizer)
    like = next(language_model.parameters())
    model.model.vision_tower.to(like.device)
    model.model.vision_tower.like = model.model.vision_tower.like.to(like.dtype)
    projector = model.model.multi_modal_projector.to_empty(device=like.device).to(like.dtype)
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    model.generation_config = copy.deepcopy(language_model.generation_config)
    # A picture's place is never an answer.
    others = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*others, image_id]
    return model.eval()


def assemble(
    vision: TokenFlowVisionConfig, text: PretrainedConfig, image_id: int
) -> LlavaForConditionalGeneration:
    """LLaVA over a tokenizer, without weights (on the meta device)."""
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=vision.visual_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def with_image_token(text: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The text tokenizer with ``<image>`` as a special token: itself where it has it, else a copy
    that has it as its last id."""
    if chat.IMAGE in text.get_added_vocab():
        return text
    text = copy.deepcopy(text)
    text.add_tokens([AddedToken(chat.IMAGE, normalized=False, special=True)], special_tokens=True)
    return text


def image_token_id(text: PreTrainedTokenizerBase) -> int:
    """The id of ``<image>``, which a text tokenizer has or gets."""
    found = with_image_token(text).convert_tokens_to_ids(chat.IMAGE)
    assert isinstance(found, int)  # of one token
    return found


def build_processor(
    model: LlavaForConditionalGeneration,
    text_tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    do_pad: bool = True,
) -> LlavaProcessor:
    """The processor of a model: pictures to pixels, texts to ids with a place for every row.

    Args:
        model: of :func:`build_understanding` or :func:`load_released_understanding`.
        text_tokenizer: of the language model.
        chat_template: one of :data:`.chat.FORMS`, or a template of transformers; None is the
            language model's own, or ``vicuna`` where it has none.
        do_pad: whether pictures are padded to a square (see :class:`.pixels`).

    Raises:
        ConfigError: a text tokenizer whose ``<image>`` is another id than the model's.
    """
    vision: Any = model.config.vision_config
    text = with_image_token(text_tokenizer)
    found, wanted = text.convert_tokens_to_ids(chat.IMAGE), model.config.image_token_id
    if found != wanted:
        raise ConfigError(
            f"{chat.IMAGE} is id {found} of the text tokenizer, and {wanted} of the model: give "
            "build_understanding the text_tokenizer"
        )
    if chat_template is None:
        own = text.chat_template
        chat_template = chat.with_parts(own) if isinstance(own, str) else chat.template("vicuna")
    elif chat_template in chat.FORMS:
        chat_template = chat.template(chat_template)
    # LlavaProcessor counts (S // patch)^2 places, and those that are added.
    patch = vision.image_size // vision.tokenizer_config.grid
    counted = (vision.image_size // patch) ** 2
    return LlavaProcessor(
        image_processor=TokenFlowImageProcessor(vision.image_size, do_pad=do_pad),
        tokenizer=text,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=chat_template,
        image_token=chat.IMAGE,
        num_additional_image_tokens=vision.visual_tokens - counted,
    )
