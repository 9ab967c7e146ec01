"""What a checkpoint gives the page: a tokenizer, a model that draws, one that answers, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tokenflow_ext.models import VAR, CheckpointError, ConfigError, TextToImage, TokenFlowTokenizer
from tokenflow_ext.models.serialization.pretrained import CONFIG_FILE
from tokenflow_ext.models.serialization.transformers_folder import answers, answers_and_draws
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.evaluation.analyse import names_of
from tokenflow_ext.train.evaluation.answering import Answerer
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator, ImageGenerator


@dataclass
class Models:
    """What there is to show, each by the name of its checkpoint, in the order of the checkpoints.

    Attributes:
        tokenizers: those asked for, and those of the models that draw.
        drawing: models of text to image and of classes.
        answering: models that answer questions.
    """

    tokenizers: dict[str, TokenFlowTokenizer] = field(default_factory=dict)
    drawing: dict[str, ImageGenerator | ClassImageGenerator] = field(default_factory=dict)
    answering: dict[str, Answerer] = field(default_factory=dict)


def load(
    sources: Sequence[str],
    device: torch.device,
    resolution: int | None = None,
    dtype: str = "float32",
) -> Models:
    """The models at ``sources``.

    Where a tokenizer is among them, the models' own are not shown beside it: a model that draws
    brings its tokenizer where no other is asked for.

    Args:
        resolution: see :meth:`TokenFlowTokenizer.from_pretrained`.
        dtype: of the models that draw and answer; tokenizers are in float32.

    Raises:
        CheckpointError: nothing there, not whole, or of a kind that no tab is for.
    """
    for source in sources:  # before the first, which may be large, is read
        checkpoint.check_there(source)
    found, brought = Models(), {}
    for name, source in zip(names_of(sources), sources, strict=True):
        kind = _kind(source)
        if kind == "tokenizer":
            tokenizer, _ = checkpoint.load_tokenizer(source, resolution)
            found.tokenizers[name] = tokenizer.to(device)
        if kind in ("text", "both"):
            found.drawing[name] = ImageGenerator.load(source, str(device), dtype)
        if kind == "classes":
            found.drawing[name] = ClassImageGenerator.load(source, str(device), dtype=dtype)
        if kind in ("answers", "both"):
            found.answering[name] = Answerer(source, device, dtype)
        if name in found.drawing:
            brought[name] = found.drawing[name].model.tokenizer
    if not found.tokenizers:
        found.tokenizers = brought
    return found


def _kind(source: str) -> str:
    """``tokenizer``, ``text``, ``classes``, ``answers`` or ``both``.

    Raises:
        CheckpointError: another kind.
    """
    if checkpoint.is_released(source):
        return "tokenizer"
    folder = checkpoint.find(source)
    if VAR.is_saved(folder):
        return "classes"
    if TextToImage.is_saved(folder):
        return "text"
    if answers_and_draws(folder):
        return "both"
    if answers(folder):
        return "answers"
    try:
        TokenFlowTokenizer.read_config(folder)
    except ConfigError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} has no tab in the demo: {Path(folder) / CONFIG_FILE} is not of a tokenizer, "
            f"a text to image or VAR model, or an understanding model ({error})"
        ) from error
    return "tokenizer"
