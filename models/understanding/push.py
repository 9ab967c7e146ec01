"""Understanding models to the hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import LlavaForConditionalGeneration, ProcessorMixin

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.serialization.push import Card, PushOptions, push
from tokenflow_ext.models.serialization.transformers_folder import answers

from .vision import TokenFlowVisionModel

if TYPE_CHECKING:
    from typing import Unpack

    from huggingface_hub import CommitInfo

_USAGE = """
import tokenflow_ext.models  # transformers knows its models then
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("REPOSITORY")
processor = AutoProcessor.from_pretrained("REPOSITORY")
content = [{"type": "image", "image": photo}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs.to(model.dtype), max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_DRAWING = "tokenflow_text"


def push_understanding(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    repo_id: str,
    *,
    max_shard_size: str = "5GB",
    **options: Unpack[PushOptions],
) -> CommitInfo:
    """Saves to the hub what ``save_pretrained`` of the model and of its processor write, with a
    model card, in one commit. transformers' own ``push_to_hub`` writes neither figures nor licence,
    and over any model that is there.

    Args:
        model: of :func:`.build.build_understanding`, ``build_unified`` or
            :func:`.original_checkpoint.load_released_understanding`.
        processor: of :func:`.build.build_processor`.
        repo_id, options: as for :meth:`~tokenflow_ext.models.TokenFlowTokenizer.push_to_hub`.
        max_shard_size: the largest file; what does not fit into one goes into several.

    Raises:
        ConfigError: a model over no tokenizer, or a ``repo_id`` that is none.
        OutputError, MissingPackageError: see there.
    """
    tower: Any = model.model.vision_tower
    if not isinstance(tower, TokenFlowVisionModel):
        raise ConfigError(
            f"the model's tower must be a TokenFlowVisionModel, got {type(tower).__name__}: its "
            "own push_to_hub saves it"
        )
    config = model.config.to_diff_dict()
    # The header of the released folder that a model was read from says the same once more.
    config.pop("original_config", None)
    kind, tags = "understanding model", ["image-text-to-text"]
    if config["text_config"]["model_type"] == _DRAWING:
        kind, tags = "model that answers and draws", [*tags, "text-to-image"]

    def save(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)

    return push(
        save,
        answers,
        Card(kind, tuple(tags), _USAGE, "image-text-to-text"),
        config,
        repo_id,
        **options,
    )
