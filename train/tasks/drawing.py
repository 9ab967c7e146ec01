"""What a training that predicts pictures' tokens from captions does, whatever else it does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tokenflow_ext.models.text_to_image.model import TextToImage
from tokenflow_ext.models.text_to_image.sequence import encode_prompts
from tokenflow_ext.sampler import SamplingConfig
from tokenflow_ext.train.config import CaptionConfig
from tokenflow_ext.train.data import captions
from tokenflow_ext.train.engine.distributed import Processes

from . import image_tokens


class Drawing:
    """Captions and pictures to what a model learns of them, its evaluation, and what it draws.

    Args:
        model: it may be trained meanwhile.
        text: the text tokenizer.
        local: pairs that a process computes at once.
        autocast: around forward passes.
    """

    def __init__(
        self,
        model: TextToImage,
        text: Any,
        group: Processes,
        local: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.text, self.group = model, text, group
        self.local, self.autocast = local, autocast

    def tokens(self, pictures: Tensor) -> Tensor:
        """Images to tokens, tokens as they are; [B, L]."""
        return image_tokens.tokens(self.model.tokenizer, pictures, self.group.device)

    def prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts [B, T], and which of their positions are no padding [B, T]."""
        ids, valid = encode_prompts(texts, self.text, self.model.config)
        return ids.to(self.group.device), valid.to(self.group.device)

    def batch(self, collated: tuple[Tensor, list[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`TextToImage.forward` takes: prompts, tokens [B, L], valid positions."""
        pictures, texts = collated
        ids, valid = self.prompts(texts)
        return ids, self.tokens(pictures), valid

    def evaluated(
        self, section: CaptionConfig, known: Any, form: captions.Form, joint: int, seed: int
    ) -> dict[str, tuple[Tensor, list[str]]]:
        """What an evaluation looks at: pairs that are trained on, under ``known``, and under
        ``held_out`` those that the section holds out, where it does. Tokens [N, L] and captions,
        spread evenly.

        Args:
            known: the source that is trained on.
            form, joint, seed: as of :func:`.captions.open_source`.
        """
        sets = {"known": known}
        held_out = None
        if section.unseen:
            choice = captions.Choice(section.match, section.unseen, held_out=True)
            held_out = section.path, choice
        elif section.held_out is not None:
            held_out = section.held_out, captions.Choice()
        if held_out is not None:
            path, choice = held_out
            sets["held_out"] = captions.open_source(path, form, section, joint, seed, choice)
        return {name: self._some(source, section.evaluated) for name, source in sets.items()}

    def _some(self, source: Any, count: int) -> tuple[Tensor, list[str]]:
        pictures, texts = captions.collate(captions.some(source, count))
        parts = [self.tokens(part).cpu() for part in pictures.split(self.local)]
        return torch.cat(parts), texts

    def score(self, known: Tensor, texts: list[str]) -> tuple[float, float]:
        """Cross-entropy and share of right tokens, each predicted from the true ones before (every
        process calls this).

        Args:
            known: tokens [N, L] of the captions' pictures.
        """

        def run(rows: list[int], target: Tensor) -> Any:
            ids, valid = self.prompts([texts[i] for i in rows])
            with self.autocast():
                return self.model(ids, target, valid)

        return image_tokens.score(known, run, self.group, self.local)

    def pictures(
        self,
        known: Tensor,
        texts: list[str],
        count: int,
        sampling: SamplingConfig,
        seed: int,
        everywhere: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What the image tokenizer makes of ``count`` pictures, and what the model draws from their
        captions; two of [count, 3, S, S].

        Args:
            known: tokens [N, L] of the captions' pictures.
            everywhere: whether every process draws. Where all hold all weights, one of them does.
        """
        count = min(count, len(texts))
        which = [i * len(texts) // count for i in range(count)]
        target = known[which].to(self.group.device)
        drawn = target
        if self.group.first or everywhere:
            ids, valid = self.prompts([texts[i] for i in which])
            empty, empty_valid = self.prompts([""])
            drawn = self.model.generate_tokens(
                ids,
                empty,
                attention_mask=valid,
                negative_attention_mask=empty_valid,
                sampling=sampling,
                seed=seed,
            )
        return image_tokens.decoded(self.model.tokenizer, target, drawn)
