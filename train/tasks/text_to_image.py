"""The training of a text-to-image model: one process, DDP, or weights split over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.text_to_image.backbone import Layer
from tokenflow_ext.models.text_to_image.model import TextToImage
from tokenflow_ext.models.text_to_image.sequence import TextToImageConfig
from tokenflow_ext.train import data
from tokenflow_ext.train.config import TextConfig
from tokenflow_ext.train.data import captions, tokens
from tokenflow_ext.train.engine import checkpoint, parallel
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.ema import EMA
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.optimization import PRECISIONS, OptimizedModel, autocast
from tokenflow_ext.train.engine.random_state import seed_generators, undrawn
from tokenflow_ext.train.engine.task import Task

from . import image_tokens
from .drawing import Drawing
from .language import TEXT_FOLDER, load_language_model, load_text_tokenizer, make_text_tokenizer

_CAPTIONS = 100_000  # of which a text tokenizer is made, at most


class TextToImageTask(Task):
    """A transformer that learns to predict the tokens of captions' images, scale by scale."""

    progress = ("loss",)
    evaluation = ("evaluation", "evaluation")
    metrics = {  # noqa: RUF012
        "known_loss": ("cross-entropy, training pairs", "{:.3f}"),
        "known_accuracy": ("right tokens, training pairs", "{:.1%}"),
        "held_out_loss": ("cross-entropy, held-out pairs", "{:.3f}"),
        "held_out_accuracy": ("right tokens, held-out pairs", "{:.1%}"),
    }

    def __init__(self, config: TextConfig, group: Processes, resuming: bool = False) -> None:
        self.config, self.group = config, group
        optim = config.optim
        self.partition = data.BatchPartition(optim.batch, optim.accumulate, group.rank, group.world)
        joint = optim.batch // optim.accumulate
        image_tokenizer, start = self._start(config)
        quantizer = image_tokenizer.config.quantizer
        form = captions.Form(
            image_tokenizer.config.image_size,
            [(side, side) for side in quantizer.scales],
            quantizer.codebook_size,
            partial(tokens.fingerprint, image_tokenizer),
        )
        self.dataset = captions.Captioned(config.data.path, form, config.data, joint, config.seed)
        seed_generators(config.seed, 0)
        model, text = self._build(image_tokenizer, start, resuming)
        if config.model.checkpointing:
            for layer in model.model.layers:
                cast(Layer, layer).checkpointing = True
        self.model: TextToImage = model.float().to(group.device).train()
        self.sharded = config.parallel == "fsdp" and group.world > 1
        if self.sharded:
            precision = PRECISIONS[optim.precision]
            parallel.split_weights(self.model, self.model.model.layers, group, precision)
            register_fsdp_forward_method(self.model, "generate_tokens")
        self.transformer = OptimizedModel(
            self.model, self.model.parameters(), optim.lr, optim, group
        )
        self.optimized = {"model": self.transformer}
        self.ema = None
        if optim.ema_decay > 0:
            self.ema = EMA(dict(self.model.named_parameters()), optim.ema_decay)
        self.drawing = Drawing(self.model, text, group, self.partition.local, self._autocast)
        self.evaluated = self.drawing.evaluated(
            config.data, self.dataset.source, form, joint, config.seed
        )

    # -- the model --------------------------------------------------------------------------------

    @staticmethod
    def _start(config: TextConfig) -> tuple[TokenFlowTokenizer, Path | None]:
        """The image tokenizer, and the saved model to start from."""
        if config.init is None:
            return checkpoint.load_tokenizer(config.tokenizer, config.resolution)[0], None
        folder = checkpoint.find(config.init)
        return TokenFlowTokenizer.from_pretrained(folder / "tokenizer"), folder

    def _build(
        self, tokenizer: TokenFlowTokenizer, start: Path | None, resuming: bool
    ) -> tuple[TextToImage, Any]:
        """The model and its text tokenizer."""
        wanted = self.config.model
        attention = cast(Literal["sdpa", "flex"], wanted.attention)
        if start is not None:
            text = load_text_tokenizer(start)
            return TextToImage.from_pretrained(start, tokenizer, attention=attention), text
        if self.config.backbone is not None:
            language, text = load_language_model(self.config.backbone)
            with undrawn(resuming):
                model = TextToImage.from_language_model(
                    language, tokenizer, wanted.prompt_length, attention=attention
                )
            return model, text
        texts = self.dataset.source.captions_up_to(_CAPTIONS)
        text = make_text_tokenizer(texts, wanted.vocabulary)
        shape = TextToImageConfig.for_tokenizer(
            wanted.backbone, tokenizer, len(text), wanted.prompt_length
        )
        with undrawn(resuming):
            return TextToImage(shape, tokenizer, attention=attention), text

    def _autocast(self) -> AbstractContextManager[Any]:
        # Split weights come in half precision already.
        precision = self.config.optim.precision
        return nullcontext() if self.sharded else autocast(precision, self.group.device)

    # -- a step -----------------------------------------------------------------------------------

    def batches(self, position: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What the model takes: prompts, tokens, which positions of the prompts are no padding."""
        workers = self.config.data.workers
        loader = data.loader(self.dataset, self.partition, position, workers, captions.collate)
        for collated in loader:
            yield self.drawing.batch(collated)

    def micro_step(self, batch: tuple[Tensor, Tensor, Tensor], step: int) -> dict[str, Tensor]:
        with self._autocast():
            loss = self.transformer.parallel(*batch).loss
        self.transformer.backward(loss)
        return {"loss": loss}

    # -- what people see --------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Cross-entropy and share of right tokens, each token predicted from the true ones before.

        Of pairs that are trained on, and of held-out ones where there are any.
        """
        values: dict[str, float] = {}
        for name, (target, texts) in self.evaluated.items():
            loss, accuracy = self.drawing.score(target, texts)
            values |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return values

    def pictures(self) -> tuple[Tensor, Tensor]:
        """What the tokenizer makes of training pictures, and what the model draws from captions."""
        config = self.config
        return self.drawing.pictures(
            *self.evaluated["known"],
            config.output.pictures,
            config.sample,
            config.seed,
            everywhere=self.sharded,  # split weights need each other
        )

    def headline(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return (
            f"{count / 1e6:.2f} M parameters, {self.dataset.describe()}, "
            f"{self.model.config.image_tokens} tokens an image"
        )

    def listing(self) -> Iterator[str]:
        yield from self.dataset.source.listing()
        for _, texts in self.evaluated.values():
            yield from texts

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        with torch.device("meta"):
            model = TextToImage(self.model.config, self.model.tokenizer)
        model.load_state_dict(weights, assign=True)
        model.save_pretrained(folder)
        self.drawing.text.save_pretrained(folder / TEXT_FOLDER)

    def check(self, path: Path) -> None:
        TextToImage.read_config(path)  # of this version, or refused
        name = self.config.init or self.config.tokenizer
        image_tokens.check_same(path, self.model.tokenizer, name)

    def restore(self, path: Path) -> None:
        self.drawing.text = load_text_tokenizer(path)


def text_trainer(config: TextConfig, group: Processes) -> Trainer:
    """The run of a text-to-image model, as the class ``TextTrainer`` of before gave it."""
    return Trainer(config, group, TextToImageTask)


__getattr__ = renamed(__name__, {"TextTrainer": "text_trainer"})
