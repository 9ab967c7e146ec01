"""Answers of an understanding model to questions about pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.understanding.chat import IMAGE
from tokenflow_ext.models.understanding.names import DTYPES
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.tasks.understanding import load_understanding

Message = dict[str, str]
"""{"role": "user" or "assistant", "content": a text with ``<image>`` where a picture stands}."""


class _Words(TextStreamer):
    """Words as they come, printed or told to a function."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See the base class."""
        if self.tell is None:
            super().on_finalized_text(text, stream_end)
        else:
            self.tell(text)


class Answerer:
    """A model that answers.

    Args:
        place: a run, a checkpoint, or a folder that ``save_pretrained`` wrote.
        device: where it computes.
        dtype: of the language model; tokens are computed as its configuration says.

    Raises:
        CheckpointError: no such model.
        ConfigError: another dtype.
    """

    def __init__(self, place: str | Path, device: torch.device, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        model, self.processor = load_understanding(place)
        self.model = cast(Any, model.eval()).to(device=device, dtype=getattr(torch, dtype))
        self.device = device
        self.processor.tokenizer.padding_side = "left"  # answers begin side by side

    @property
    def _reach(self) -> int | None:
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    def square(self, picture: Image.Image) -> Image.Image:
        """What the model reads of a picture: its answers about both are the same."""
        return cast(Image.Image, self.processor.image_processor.square(picture))

    def inputs(
        self,
        chats: Sequence[Sequence[Message]],
        pictures: Sequence[Sequence[Image.Image]],
        new: int,
    ) -> dict[str, Tensor]:
        """What the model is given, side by side.

        Args:
            chats: conversations that end with a question.
            pictures: of each conversation, in reading order.
            new: ids of an answer at most.

        Raises:
            DataError: a conversation with places for another number of pictures, or one that the
                model's context has no room for.
        """
        for messages, own in zip(chats, pictures, strict=True):
            places = sum(message["content"].count(IMAGE) for message in messages)
            if places != len(own):
                raise DataError(
                    f"the prompt has {places} places for pictures ({IMAGE}), and there are "
                    f"{len(own)}"
                )
        texts = [
            self.processor.apply_chat_template(list(messages), add_generation_prompt=True)
            for messages in chats
        ]
        images = [list(own) for own in pictures]
        given = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
        )
        longest = int(given["attention_mask"].sum(1).max())
        if self._reach is not None and longest + new > self._reach:
            raise DataError(
                f"a prompt of {longest} ids (its pictures' included) and an answer of {new} do not "
                f"fit into the model's context of {self._reach}: ask for a shorter answer, or "
                "begin a new conversation"
            )
        return {key: value.to(self.device) for key, value in given.items()}

    def answer(
        self,
        chats: Sequence[Sequence[Message]],
        pictures: Sequence[Sequence[Image.Image]],
        new: int = 64,
        temperature: float = 0.0,
        stream: bool | Callable[[str], None] = False,
    ) -> list[str]:
        """Answers, one for each conversation.

        Args:
            temperature: 0 is greedy; otherwise answers are drawn with torch's generator.
            stream: print words as they come, of a single conversation, or tell them to a function.
                An error that it raises ends the answer.

        Raises:
            DataError: see :meth:`inputs`.
        """
        given = self.inputs(chats, pictures, new)
        text = self.processor.tokenizer
        settings = GenerationConfig.from_dict(self.model.generation_config.to_dict())
        settings.update(
            max_new_tokens=new,
            do_sample=temperature > 0,
            temperature=temperature or None,
            pad_token_id=text.eos_token_id if text.pad_token_id is None else text.pad_token_id,
        )
        if settings.eos_token_id is None:
            settings.eos_token_id = text.eos_token_id
        streamer = _Words(text, None if isinstance(stream, bool) else stream)
        with torch.no_grad():
            found = self.model.generate(
                **given, generation_config=settings, streamer=streamer if stream else None
            )
        start = given["input_ids"].shape[1]
        written = text.batch_decode(found[:, start:], skip_special_tokens=True)
        return [answer.strip() for answer in written]
