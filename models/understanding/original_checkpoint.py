"""The released understanding models: their names read into transformers' LLaVA and written back.

    model.embed_tokens, model.layers.N..., model.norm    the language model (Llama's, Qwen2's names)
    lm_head.weight
    model.mm_projector.{0,2}.{weight,bias}               multi_modal_projector.linear_{1,2}
    model.vision_tower.vision_tower.*                    every key of a released tokenizer

A folder has ``config.json`` beside them: the language model's configuration, with keys of the
original programs (``mm_projector_type`` and others), which are kept and written back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.serialization.hub import (
    TRANSFORMERS_FILES,
    Hub,
    resolve,
)
from tokenflow_ext.models.serialization.state_dict import compare, read_state_dict, without_prefix
from tokenflow_ext.models.serialization.transformers_folder import (
    FILES_ALONE,
    HEADER,
    TEXT_FILES,
    first_line,
    read_header,
    write,
)
from tokenflow_ext.models.tokenizer import original_checkpoint as tokenizer_checkpoint
from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer

from .build import assemble, image_token_id
from .names import DTYPES
from .vision import TokenFlowVisionConfig, TokenFlowVisionModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = {
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
}
_LANGUAGE = "model.language_model."
_HEAD = "lm_head.weight"
_EMBEDDINGS = "model.embed_tokens.weight"
_FAMILIES = ("qwen2", "qwen3", "llama")
# What the original programs say of the parts that are the same in every release.
_FIXED = {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}


def load_released_understanding(
    source: str | Path | Mapping[str, Tensor],
    language_config: PretrainedConfig | None = None,
    *,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LlavaForConditionalGeneration:
    """A released understanding model, as transformers' LLaVA.

    It takes ``config.image_token_id`` once for each visual token, and ``pixel_values``
    (:func:`.build.build_processor`). The id is the text tokenizer's next free one. Without a text
    tokenizer it is one after the embeddings. Where they have no row for it, they and the head get
    one more.

    Args:
        source: a folder, a file (safetensors or torch, in one file or several with an index), a hub
            id, or a state dict.
        language_config: the language model's configuration of transformers; None reads
            ``config.json`` in the folder or beside the file.
        text_tokenizer: of the language model; None looks for one in the folder.
        dtype: None keeps the language model as it is stored, and computes tokens in float32. With
            a half-precision type the language model is cast to it and the tokenizer is rounded to
            it, as the released programs do: some tokens differ.
        filename, revision, cache_dir, token, local_files_only: of a hub id; see
            :class:`~tokenflow_ext.models.serialization.hub.Hub`.

    Raises:
        CheckpointError: names that are missing or unknown, other shapes, a file that cannot be
            read, or a tokenizer that is not one of the released.
        ConfigError: a language model that is no Llama or Qwen, or does not fit the weights.
    """
    hub = Hub(filename, revision, cache_dir, token, local_files_only)
    if isinstance(source, Mapping):
        hub.refuse("a state dict")
    else:
        beside = [HEADER, *TRANSFORMERS_FILES]
        source = resolve(source, hub, files=TRANSFORMERS_FILES, beside=beside)
    named = "the state dict" if isinstance(source, Mapping) else str(source)
    header: dict[str, Any] | None = None
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    if language_config is None:
        if isinstance(source, Mapping):
            raise ConfigError("language_config must be given for a state dict, got None")
        header = read_header(source, "language_config")
        language_config = _language_config(header, named)
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    tower = without_prefix(state, TOWER)
    if not tower:
        raise CheckpointError(f"{named} has no tokenizer: no name begins with {TOWER}")
    rest = {key: value for key, value in state.items() if not key.startswith(TOWER)}
    stored = _one_dtype(rest, named)
    tower_dtype = _one_dtype(
        {k: v for k, v in tower.items() if v.is_floating_point()}, f"the tokenizer of {named}"
    )
    tokenizer = TokenFlowTokenizer.from_original(
        {k: v.float() if v.is_floating_point() else v for k, v in tower.items()},
        source=f"the tokenizer of {named}",
    )
    rounded = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    vision = TokenFlowVisionConfig(
        tokenizer.config, tokenizer_dtype=str(rounded).removeprefix("torch.")
    )
    rows = _rows(rest, language_config, named)
    if text_tokenizer is None and not isinstance(source, Mapping):
        text_tokenizer = _text_tokenizer(Path(source))
    image_id = rows if text_tokenizer is None else image_token_id(text_tokenizer)
    text = AutoConfig.for_model(**language_config.to_dict())
    text.vocab_size = max(rows, image_id + 1)
    model = assemble(vision, text, image_id)
    own = _renamed(rest)
    for name in (_LANGUAGE + "embed_tokens.weight", _HEAD):
        if name in own:
            own[name] = _with_rows(own[name], text.vocab_size)
    if text.tie_word_embeddings:
        own.setdefault(_HEAD, own[_LANGUAGE + "embed_tokens.weight"])
    wanted = {k: v for k, v in model.state_dict().items() if ".vision_tower." not in k}
    if difference := compare(own, wanted, dtypes=False):
        raise CheckpointError(f"{named} does not fit the language model: {difference}")
    kind = stored if dtype is None else dtype
    config: Any = model.config
    config.original_vocab_size = rows
    config.original_config = header
    config.original_tokenizer_dtype = str(tower_dtype).removeprefix("torch.")
    if any(value.is_meta for value in own.values()):
        model.load_state_dict(own, strict=False, assign=True)
    else:
        prefix = "model.vision_tower.tokenizer."
        own |= {prefix + key: value for key, value in tokenizer.state_dict().items()}
        # transformers' own loading fills in what no file holds, such as tables of angles.
        model = LlavaForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=own, dtype=kind
        )
    model.model.vision_tower = _tower(vision, tokenizer, kind)
    # A picture's place is never an answer.
    model.generation_config = GenerationConfig.from_model_config(text)
    model.generation_config.suppress_tokens = [image_id]
    return model.eval()


def _tower(
    vision: TokenFlowVisionConfig, tokenizer: TokenFlowTokenizer, dtype: torch.dtype
) -> TokenFlowVisionModel:
    tower = TokenFlowVisionModel(vision, tokenizer)
    tower.like = tower.like.to(dtype)
    return tower


def _language_config(header: dict[str, Any], named: str) -> PretrainedConfig:
    family = str(header.get("model_type"))
    found = next((x for x in _FAMILIES if x in family.replace("qwen_", "qwen2_")), None)
    if found is None and "qwen" in family:
        found = "qwen2"
    if found is None:
        raise ConfigError(
            f"{named}: model_type must name one of {', '.join(_FAMILIES)}, got {shown(family)}"
        )
    for key, value in _FIXED.items():
        if header.get(key, value) != value:
            raise ConfigError(f"{named}: {key} must be {value!r}, got {shown(header[key])}")
    known = AutoConfig.for_model(found).to_dict().keys() | {"rope_theta", "rope_scaling"}
    values = {key: value for key, value in header.items() if key in known - {"model_type"}}
    try:
        return AutoConfig.for_model(found, **values)
    except Exception as error:  # of many types, by the version of transformers
        raise ConfigError(f"{named}: no configuration of {found}: {first_line(error)}") from error


def _one_dtype(state: Mapping[str, Tensor], named: str) -> torch.dtype:
    kinds = {value.dtype: key for key, value in state.items()}
    if len(kinds) != 1 or not next(iter(kinds)).is_floating_point:
        of = ", ".join(f"{key} is {kind}" for kind, key in kinds.items()) or "there are none"
        raise CheckpointError(f"{named}: weights must be of one floating-point type, {of}")
    return next(iter(kinds))


def _rows(state: Mapping[str, Tensor], config: PretrainedConfig, named: str) -> int:
    """Rows of the embeddings, which the configuration must agree with."""
    if _EMBEDDINGS not in state:
        raise CheckpointError(f"{named} has no {_EMBEDDINGS}")
    rows = len(state[_EMBEDDINGS])
    if rows != config.vocab_size:
        raise ConfigError(f"vocab_size is {config.vocab_size}, {named} has {rows} embeddings")
    return rows


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """A table with rows of zeros at its end, where it has fewer."""
    more = rows - len(table)
    return torch.cat([table, table.new_zeros(more, table.shape[1])]) if more > 0 else table


def _text_tokenizer(source: Path) -> PreTrainedTokenizerBase | None:
    """The text tokenizer in a folder, or beside a file."""
    folder = source if source.is_dir() else source.parent
    if not any((folder / name).is_file() for name in TEXT_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, **FILES_ALONE)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything but the tokenizer by transformers' names."""
    own: dict[str, Tensor] = {}
    for key, value in state.items():
        start = next((start for start in PROJECTOR if key.startswith(start)), None)
        if start is not None:
            own[PROJECTOR[start] + key.removeprefix(start)] = value
        elif key.startswith("model."):
            own[_LANGUAGE + key.removeprefix("model.")] = value
        else:
            own[key] = value
    return own


def to_released_understanding(
    model: LlavaForConditionalGeneration, unused: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The released form of a model's weights: the inverse of :func:`load_released_understanding`.

    Args:
        unused: what a released tokenizer has and ours does not hold (SigLIP's last layer and head),
            by its names; None is what was kept when it was read.

    Raises:
        ConfigError: a model that is not of a released tokenizer's kind, or another language model.
        CheckpointError: tensors of the released form that neither source has.
    """
    config: Any = model.config
    tower: Any = model.model.vision_tower
    if not isinstance(tower, TokenFlowVisionModel):
        raise ConfigError(f"a released model's tower is a tokenizer, got {type(tower).__name__}")
    if config.text_config.model_type not in _FAMILIES:
        raise ConfigError(
            f"released models have a language model of {', '.join(_FAMILIES)}, this one is "
            f"{config.text_config.model_type!r}: save_pretrained saves it"
        )
    if tower.config.window != 1:
        raise ConfigError(f"released models have window 1, this one has {tower.config.window}")
    rows = getattr(config, "original_vocab_size", config.image_token_id)
    released: dict[str, Tensor] = {}
    back = {ours: theirs for theirs, ours in PROJECTOR.items()}
    for key, value in model.state_dict().items():
        start = next((start for start in back if key.startswith(start)), None)
        if key.startswith("model.vision_tower."):
            continue
        if start is not None:
            released[back[start] + key.removeprefix(start)] = value
            continue
        name = "model." + key.removeprefix(_LANGUAGE) if key.startswith(_LANGUAGE) else key
        if name in (_EMBEDDINGS, _HEAD) and len(value) > rows:
            value = value[:rows].clone()
        released[name] = value
    if config.text_config.tie_word_embeddings:
        released.pop(_HEAD, None)
    tokenizer = tower.tokenizer
    own = tokenizer_checkpoint.to_original(
        tokenizer.state_dict(),
        tokenizer.config,
        tokenizer.unused_tensors if unused is None else unused,
    )
    kind = getattr(torch, getattr(config, "original_tokenizer_dtype", DTYPES[0]))
    for key, value in own.items():
        released[TOWER + key] = value.to(kind) if value.is_floating_point() else value
    return released


def save_released_understanding(
    model: LlavaForConditionalGeneration,
    path: str | Path,
    unused_from: str | Path | None = None,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a folder with the released names.

    Args:
        unused_from: a released tokenizer or understanding model to take from what our tokenizer
            does not hold; None is what was kept when it was read.
        max_shard_size: the largest file; what does not fit into one goes into several.
        overwrite: whether to replace a model that is there.

    Raises:
        OutputError: a model is there, or the files cannot be written.
        ConfigError, CheckpointError: see :func:`to_released_understanding`.
    """
    config: Any = model.config
    unused = None
    if unused_from is not None:
        found = read_state_dict(unused_from)
        found = without_prefix(found, TOWER) or found
        shapes = tokenizer_checkpoint.unused_shapes(config.vision_config.tokenizer_config)
        unused = {key: found[key] for key in shapes if key in found}
    state = to_released_understanding(model, unused)
    header = getattr(config, "original_config", None)
    if header is None:
        header = config.text_config.to_diff_dict()
        header["vocab_size"] = len(state[_EMBEDDINGS])
        header |= _FIXED
    return write(path, state, header, max_shard_size, overwrite)
