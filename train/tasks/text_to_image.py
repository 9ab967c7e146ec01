"""The training of a text-to-image model: one process, DDP, or weights split over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.text_to_image.model import TextToImage
from tokenflow_ext.models.text_to_image.sequence import TextToImageConfig, encode_prompts
from tokenflow_ext.train import data
from tokenflow_ext.train.config import TextConfig
from tokenflow_ext.train.data import captions, tokens
from tokenflow_ext.train.engine import checkpoint, parallel
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.loop import BaseTrainer

from .language import TEXT_FOLDER, load_language_model, load_text_tokenizer, make_text_tokenizer

_CAPTIONS = 100_000  # of which a text tokenizer is made, at most


class TextTrainer(BaseTrainer):
    """The run of a text-to-image model."""

    shown = ("loss",)
    evaluated_on = ("evaluation", "evaluation")
    names = {  # noqa: RUF012
        "known_loss": ("cross-entropy, training pairs", "{:.3f}"),
        "known_accuracy": ("right tokens, training pairs", "{:.1%}"),
        "held_out_loss": ("cross-entropy, held-out pairs", "{:.3f}"),
        "held_out_accuracy": ("right tokens, held-out pairs", "{:.1%}"),
    }

    def __init__(self, config: TextConfig, group: Processes) -> None:
        super().__init__(config, group)
        joint = config.optim.batch // config.optim.accumulate
        image_tokenizer, start = self._start(config)
        quantizer = image_tokenizer.config.quantizer
        form = captions.Form(
            image_tokenizer.config.image_size,
            [(side, side) for side in quantizer.scales],
            quantizer.codebook_size,
            partial(tokens.fingerprint, image_tokenizer),
        )
        self.dataset = captions.Captioned(config.data.path, form, config.data, joint, config.seed)
        self._seed(0)  # every process builds the same weights
        model, self.text_tokenizer = self._build(config, image_tokenizer, start)
        if config.model.checkpointing:
            for layer in model.model.layers:
                layer.checkpointing = True
        self.model = self._place(model.float().to(group.device).train())
        self.optimizer, self.scheduler = self._optimizer(self.model.parameters(), config.optim.lr)
        self.average = None
        if config.optim.ema_decay > 0:
            weights = dict(self.model.named_parameters())
            self.average = parallel.Average(weights, config.optim.ema_decay)
        sets = {"known": self.dataset.source}
        held_out = None
        if config.data.unseen:
            choice = captions.Choice(config.data.match, config.data.unseen, held_out=True)
            held_out = config.data.path, choice
        elif config.data.held_out is not None:
            held_out = config.data.held_out, captions.Choice()
        if held_out is not None:
            folder, choice = held_out
            sets["held_out"] = captions.open_source(
                folder, form, config.data, joint, config.seed, choice
            )
        self.evaluated = {name: self._fixed(source) for name, source in sets.items()}
        self._seed(1 + group.rank)

    # -- the model --------------------------------------------------------------------------------

    @staticmethod
    def _start(config: TextConfig) -> tuple[TokenFlowTokenizer, Path | None]:
        """The image tokenizer, and the saved model to start from."""
        if config.init is None:
            return checkpoint.load_tokenizer(config.tokenizer, config.resolution)[0], None
        folder = checkpoint.find(config.init)
        return TokenFlowTokenizer.from_pretrained(folder / "tokenizer"), folder

    def _build(
        self, config: TextConfig, tokenizer: TokenFlowTokenizer, start: Path | None
    ) -> tuple[TextToImage, Any]:
        """The model and its text tokenizer."""
        wanted = config.model
        if start is not None:
            text = load_text_tokenizer(start)
            return TextToImage.from_pretrained(start, tokenizer, attention=wanted.attention), text
        if config.backbone is not None:
            language, text = load_language_model(config.backbone)
            model = TextToImage.from_language_model(
                language, tokenizer, wanted.prompt_length, attention=wanted.attention
            )
            return model, text
        texts = self.dataset.source.captions_up_to(_CAPTIONS)
        text = make_text_tokenizer(texts, wanted.vocabulary)
        shape = TextToImageConfig.for_tokenizer(
            wanted.backbone, tokenizer, len(text), wanted.prompt_length
        )
        return TextToImage(shape, tokenizer, attention=wanted.attention), text

    def _place(self, model: TextToImage) -> TextToImage:
        """Split the weights over processes where that is asked for."""
        self.sharded = self.config.parallel == "fsdp" and self.group.world > 1
        if not self.sharded:
            return model
        parallel.split_weights(model, model.model.layers, self.group, self.dtype)
        register_fsdp_forward_method(model, "generate_tokens")
        return model

    def prepare(self) -> None:
        """Wrap the model for its processes and start reading."""
        self.parallel = parallel.distribute(self.model, self.group)
        workers = self.config.data.workers
        loader = data.loader(self.dataset, self.partition, self.position, workers, captions.collate)
        self._start_reading(iter(loader))

    def _autocast(self) -> Any:
        # Split weights come in half precision already.
        return nullcontext() if self.sharded else super()._autocast()

    # -- one step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _tokens(self, pictures: Tensor) -> Tensor:
        """Pictures to tokens, tokens as they are; [B, L]."""
        pictures = pictures.to(self.group.device, non_blocking=True)
        if not pictures.is_floating_point():
            return pictures
        return self.model.tokenizer.encode(pictures)

    def _prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, valid = encode_prompts(texts, self.text_tokenizer, self.model.config)
        return ids.to(self.group.device), valid.to(self.group.device)

    def _next_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, which of their places are no padding, and tokens of the next micro-batch."""
        pictures, texts = next(self._batches)
        return *self._prompts(texts), self._tokens(pictures)

    def train_step(self) -> dict[str, Tensor]:
        optim = self.config.optim
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.group.device)
        for micro in range(optim.accumulate):
            ids, valid, tokens = self._take_batch()
            with parallel.exchange(self.parallel, micro == optim.accumulate - 1):
                with self._autocast():
                    loss = self.parallel(ids, tokens, valid).loss
                self.scaler.scale(loss / optim.accumulate).backward()
            total += loss.detach() / optim.accumulate
        norm = self._update(self.model.parameters(), self.optimizer, self.scaler)
        self.scheduler.step()
        self.step += 1
        self.position += optim.batch
        if self.average is not None:
            self.average.update(self.step)
        return {"loss": total, "grad_norm": norm}

    # -- what people and files see ----------------------------------------------------------------

    def _fixed(self, source: Any) -> tuple[Tensor, list[str]]:
        """Tokens and captions of pairs spread evenly over a source."""
        pictures, texts = captions.collate(captions.some(source, self.config.data.evaluated))
        parts = [self._tokens(part).cpu() for part in pictures.split(self.partition.local)]
        return torch.cat(parts), texts

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Cross-entropy and share of right tokens, each token predicted from the true ones before.

        Of pairs that are trained on, and of held-out ones where there are any.
        """
        values = {}
        with self._ready() as model:
            for name, (tokens, texts) in self.evaluated.items():
                loss, accuracy = self._score(model, tokens, texts)
                values |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return values

    def _score(self, model: TextToImage, tokens: Tensor, texts: list[str]) -> tuple[float, float]:
        group, local = self.group, self.partition.local
        sums = torch.zeros(3, dtype=torch.float64, device=group.device)
        for start in range(0, len(texts), local * group.world):
            # A process without a share still takes part: its weights may be needed elsewhere.
            own = range(start + group.rank * local, start + (group.rank + 1) * local)
            counted = [i for i in own if i < len(texts)]
            rows = counted or [0]
            target = tokens[rows].to(group.device)
            ids, valid = self._prompts([texts[i] for i in rows])
            with self._autocast():
                out = model(ids, target, valid)
            if counted:
                right = (out.logits.argmax(-1) == target).double().mean()
                share = torch.stack([out.loss.double(), right, right.new_ones(())])
                sums += share * len(counted)
        group.sum_(sums)
        return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()

    @torch.no_grad()
    def pictures(self) -> tuple[Tensor, Tensor]:
        """What the tokenizer makes of training pictures, and what the model draws from captions."""
        tokens, texts = self.evaluated["known"]
        count = min(self.config.output.pictures, len(texts))
        which = [i * len(texts) // count for i in range(count)]
        target = tokens[which].to(self.group.device)
        ids, valid = self._prompts([texts[i] for i in which])
        empty, empty_valid = self._prompts([""])
        drawn = target
        with self._ready() as model:
            # Where processes hold all weights, one of them draws; split ones need each other.
            if self.group.first or self.sharded:
                drawn = model.generate_tokens(
                    ids,
                    empty,
                    attention_mask=valid,
                    negative_attention_mask=empty_valid,
                    sampling=self.config.sample,
                    seed=self.config.seed,
                )
            decode = model.tokenizer.decode
            return decode(target)[0], decode(drawn)[0]

    def headline(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return (
            f"{count / 1e6:.2f} M parameters, {self.dataset.describe()}, "
            f"{self.model.config.image_tokens} tokens an image"
        )

    def _listing(self) -> Iterator[str]:
        yield from self.dataset.source.listing()
        for _, texts in self.evaluated.values():
            yield from texts

    # -- checkpoints ------------------------------------------------------------------------------

    def _save_model(self, weights: dict[str, Tensor], folder: Path) -> None:
        with torch.device("meta"):
            model = TextToImage(self.model.config, self.model.tokenizer)
        model.load_state_dict(weights, assign=True)
        model.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(folder / TEXT_FOLDER)

    def _check(self, path: Path) -> None:
        TextToImage.read_config(path)  # of this version, or refused
        saved = TokenFlowTokenizer.from_pretrained(path / "tokenizer").state_dict()
        own = self.model.tokenizer.state_dict()
        same = own.keys() == saved.keys()
        if not (same and all(torch.equal(v.cpu(), saved[k]) for k, v in own.items())):
            raise checkpoint.CheckpointError(
                f"{path} was trained on the tokens of another image tokenizer than "
                f"{self.config.init or self.config.tokenizer}"
            )

    def restore(self, path: Path) -> None:
        super().restore(path)
        self.text_tokenizer = load_text_tokenizer(path)
