"""The training of one transformer both ways: it draws pictures, and it answers about them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tokenflow_ext.models import ConfigError, TextToImage, TextToImageConfig
from tokenflow_ext.models.text_to_image.backbone import Layer
from tokenflow_ext.models.understanding.build import with_image_token
from tokenflow_ext.models.unified.build import as_text_to_image, build_unified, is_unified
from tokenflow_ext.train import data
from tokenflow_ext.train.config import UnifiedConfig
from tokenflow_ext.train.data import captions
from tokenflow_ext.train.data.conversations import Batch, Conversation
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.random_state import undrawn

from .answer_cards import SIDE
from .drawing import Drawing
from .language import load_language_model
from .understanding import (
    UnderstandingTask,
    compared,
    learned_columns,
    load_understanding,
    model_inputs,
)

# Parts that one of the two ways alone runs through.
_OF_DRAWING = ("mm_projector.", "lvl_embed.", "pos_1LC")
_OF_ANSWERING = "multi_modal_projector."
Prompted = tuple[Tensor, Tensor, Tensor]


class BothWays(nn.Module):
    """What a training step calls: both ways in one forward pass, so that gradients are exchanged
    once."""

    drawing: TextToImage

    def __init__(self, model: LlavaForConditionalGeneration, drawing: TextToImage) -> None:
        super().__init__()
        self.model = model
        # Past Module.__setattr__: its weights are the model's.
        self.__dict__["drawing"] = drawing

    def forward(
        self, asked: dict[str, Any] | None, drawn: Prompted | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of what is learned of the answers, and the loss of the drawings; None where that
        way is not asked for."""
        logits = None if asked is None else self.model(**asked).logits
        return logits, None if drawn is None else self.drawing(*drawn).loss


class UnifiedTask(UnderstandingTask):
    """A transformer that learns to draw pictures and to answer questions about them."""

    config: UnifiedConfig
    metrics = {  # noqa: RUF012
        **UnderstandingTask.metrics,
        "known_drawing_loss": ("cross-entropy of tokens, training captions", "{:.3f}"),
        "known_drawing_right": ("right tokens, training captions", "{:.1%}"),
        "held_out_drawing_loss": ("cross-entropy of tokens, held-out captions", "{:.3f}"),
        "held_out_drawing_right": ("right tokens, held-out captions", "{:.1%}"),
    }

    def __init__(self, config: UnifiedConfig, group: Processes, resuming: bool = False) -> None:
        super().__init__(config, group, resuming)
        section, seed = config.drawing, config.seed
        self.captioned = captions.Captioned(section.path, self.form, section, self.joint, seed)
        self.evaluated_drawing = self.drawing.evaluated(
            section, self.captioned.source, self.form, self.joint, seed
        )

    # -- the model --------------------------------------------------------------------------------

    def _build(self, resuming: bool) -> tuple[LlavaForConditionalGeneration, Any]:
        config, wanted = self.config, self.config.model
        if config.init is not None:
            model, processor = load_understanding(config.init)
            if not is_unified(model):
                raise ConfigError(f"init={config.init} does not draw: it answers alone")
            return model.float().train(), processor.tokenizer
        tokenizer = checkpoint.load_tokenizer(config.tokenizer, config.resolution)[0]
        with undrawn(resuming):
            if config.language_model is not None:
                language, text = load_language_model(config.language_model)
                text = with_image_token(text)
                if len(text) > language.config.vocab_size:
                    language.resize_token_embeddings(len(text), mean_resizing=False)
                drawing = TextToImage.from_language_model(language, tokenizer, wanted.prompt_length)
            else:
                text = with_image_token(self._text_tokenizer())
                shape = TextToImageConfig.for_tokenizer(
                    wanted.backbone, tokenizer, len(text), wanted.prompt_length
                )
                drawing = TextToImage(shape, tokenizer)
            model = build_unified(
                drawing.float(),
                text,
                wanted.features,
                window=wanted.window,
                tokenizer_dtype=wanted.tokenizer_dtype,
            )
        return model.train(), text

    @staticmethod
    def _compute_again(model: LlavaForConditionalGeneration) -> None:
        for layer in model.model.language_model.layers:
            cast(Layer, layer).checkpointing = True

    def _called(self) -> nn.Module:
        drawing = as_text_to_image(self.model)
        self.drawing = Drawing(drawing, self.text, self.group, self.partition.local, self._autocast)
        return BothWays(self.model, drawing)

    def _choice(self) -> Any:
        if not (pattern := self.config.drawing.unseen):
            return None
        unseen = re.compile(pattern)

        def why_not(said: Conversation) -> str:
            if not said.pictures:
                return ""
            if not said.caption:
                return "about pictures without a caption, which may be held out"
            return "about pictures that are held out" if unseen.fullmatch(said.caption) else ""

        return why_not

    def _trained(self) -> list[nn.Parameter]:
        super()._trained()
        ways = self.config.ways
        for name, parameter in self.model.named_parameters():
            of_drawing = name.removeprefix("model.language_model.").startswith(_OF_DRAWING)
            if (of_drawing and "drawing" not in ways) or (
                _OF_ANSWERING in name and "answering" not in ways
            ):
                parameter.requires_grad_(False)
        return [p for p in self.model.parameters() if p.requires_grad]

    # -- a step -----------------------------------------------------------------------------------

    def batches(self, position: int) -> Iterator[tuple[Batch | None, Prompted | None]]:
        ways = self.config.ways
        asked = super().batches(position) if "answering" in ways else None
        drawn = self._drawn(position) if "drawing" in ways else None
        while True:
            yield None if asked is None else next(asked), None if drawn is None else next(drawn)

    def _drawn(self, position: int) -> Iterator[Prompted]:
        workers = self.config.drawing.workers
        loader = data.loader(self.captioned, self.partition, position, workers, captions.collate)
        for collated in loader:
            yield self.drawing.batch(collated)

    def micro_step(
        self, batch: tuple[Batch | None, Prompted | None], step: int
    ) -> dict[str, Tensor]:
        asked, drawn = batch
        inputs = None
        if asked is not None:
            columns = learned_columns(asked)
            inputs = model_inputs(asked, columns)
        with self._autocast():
            logits, drawing = self.optimized_model.parallel(inputs, drawn)
        losses = {}
        if asked is not None:
            losses["answering"] = self._mean(compared(logits, asked, columns)[0], asked)
        if drawn is not None:
            losses["drawing"] = drawing
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        self.optimized_model.backward(loss)
        return {"loss": loss, **losses}

    # -- what people see --------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """As understanding's and text to image's: of answers, and of tokens from captions."""
        values = super().evaluate()
        for name, (target, texts) in self.evaluated_drawing.items():
            loss, right = self.drawing.score(target, texts)
            values |= {f"{name}_drawing_loss": loss, f"{name}_drawing_right": right}
        return values

    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """Pictures with answers beside them, and drawings below what they should be like."""
        config = self.config
        drawn = self.drawing.pictures(
            *self.evaluated_drawing["known"], config.output.pictures, config.sample, config.seed
        )
        resized = [F.interpolate(row.float(), (SIDE, SIDE)).cpu() for row in drawn]
        answers = super().pictures()
        if answers is not None:
            resized = [torch.cat([one, other]) for one, other in zip(answers, resized, strict=True)]
        above, below = resized
        return above, below

    def headline(self) -> str:
        ways = " and ".join(self.config.ways)
        return f"{super().headline()}; {self.captioned.describe()}; {ways}"

    def listing(self) -> Iterator[str]:
        yield from super().listing()
        yield from self.captioned.source.listing()
        for _, texts in self.evaluated_drawing.values():
            yield from texts
