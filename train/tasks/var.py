"""The training of a VAR transformer: one process, DDP, or weights split over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from tokenflow_ext.models import VAR, CheckpointError, ConfigError, TokenFlowTokenizer, VarConfig
from tokenflow_ext.models.var.transformer import Block
from tokenflow_ext.train import data
from tokenflow_ext.train.config import VarTrainConfig
from tokenflow_ext.train.data import labels, tokens
from tokenflow_ext.train.data.captions import Form
from tokenflow_ext.train.data.text_files import say
from tokenflow_ext.train.engine import checkpoint, parallel
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.ema import EMA
from tokenflow_ext.train.engine.optimization import PRECISIONS, OptimizedModel, autocast
from tokenflow_ext.train.engine.random_state import seed_generators, undrawn
from tokenflow_ext.train.engine.task import Task

from . import image_tokens


class VarTask(Task):
    """A transformer that learns to predict the tokens of classes' images, scale by scale."""

    progress = ("loss",)
    evaluation = ("evaluation", "evaluation")
    metrics = {  # noqa: RUF012
        "known_loss": ("cross-entropy, training pictures", "{:.3f}"),
        "known_accuracy": ("right tokens, training pictures", "{:.1%}"),
        "held_out_loss": ("cross-entropy, held-out pictures", "{:.3f}"),
        "held_out_accuracy": ("right tokens, held-out pictures", "{:.1%}"),
    }

    def __init__(self, config: VarTrainConfig, group: Processes, resuming: bool = False) -> None:
        self.config, self.group = config, group
        if not config.data.path:
            raise ConfigError("data.path=FOLDER is missing: pictures with classes, or their tokens")
        optim = config.optim
        self.partition = data.BatchPartition(optim.batch, optim.accumulate, group.rank, group.world)
        joint = optim.batch // optim.accumulate
        seed_generators(config.seed, 0)
        start, tokenizer = self._start(config)
        quantizer = tokenizer.config.quantizer
        form = Form(
            tokenizer.config.image_size,
            [(side, side) for side in quantizer.scales],
            quantizer.codebook_size,
            partial(tokens.fingerprint, tokenizer),
        )
        wanted, seed = config.model, config.seed
        self.dataset = labels.Labelled(
            config.data.path, form, config.data, joint, seed, count=wanted.classes
        )
        self.model = self._build(start, tokenizer, resuming).float().to(group.device).train()
        blocks = cast("list[Block]", list(self.model.blocks))
        for block in blocks:
            block.checkpointing = wanted.checkpointing
        self.sharded = config.parallel == "fsdp" and group.world > 1
        if self.sharded:
            parallel.split_weights(self.model, blocks, group, PRECISIONS[optim.precision])
            register_fsdp_forward_method(self.model, "generate_tokens")
            for block in blocks:
                for name in ("rows", "step"):
                    register_fsdp_forward_method(block, name)
        self.transformer = OptimizedModel(self.model, _by_decay(self.model), optim.lr, optim, group)
        self.optimized = {"model": self.transformer}
        self.ema = None
        if optim.ema_decay > 0:
            self.ema = EMA(dict(self.model.named_parameters()), optim.ema_decay)
        sets = {"known": self.dataset}
        if config.data.held_out is not None:
            sets["held_out"] = labels.Labelled(
                config.data.held_out, form, config.data, joint, seed, self.dataset.classes
            )
        self.sets = sets
        self.evaluated = {name: self._some(one) for name, one in sets.items()}

    # -- the model --------------------------------------------------------------------------------

    @staticmethod
    def _start(config: VarTrainConfig) -> tuple[VAR | None, TokenFlowTokenizer]:
        """The model to start from, where there is one, and the image tokenizer."""
        attention = cast(Literal["scales", "flex"], config.model.attention)
        if config.init is not None and not checkpoint.is_released(config.init):
            model = VAR.from_pretrained(checkpoint.find(config.init), attention=attention)
            return model, model.tokenizer
        if not config.tokenizer:
            raise ConfigError("tokenizer=PATH is missing: the image tokenizer")
        tokenizer = checkpoint.load_tokenizer(config.tokenizer, config.resolution)[0]
        if config.init is None:
            return None, tokenizer
        return VAR.from_released(config.init, tokenizer, attention=attention), tokenizer

    def _build(self, start: VAR | None, tokenizer: TokenFlowTokenizer, resuming: bool) -> VAR:
        wanted, classes = self.config.model, self.dataset.classes
        if start is None:
            shape = VarConfig.for_tokenizer(
                tokenizer,
                depth=wanted.depth,
                width=wanted.width,
                heads=wanted.heads,
                mlp_ratio=wanted.mlp_ratio,
                classes=classes.count,
                class_names=classes.names,
                shared_adaln=wanted.shared_adaln,
                l2_attention=wanted.l2_attention,
                class_drop=wanted.class_drop,
                drop_path=wanted.drop_path,
            )
            with undrawn(resuming):
                return VAR(
                    shape, tokenizer, attention=cast(Literal["scales", "flex"], wanted.attention)
                )
        known = start.config.classes
        if known == classes.count and start.config.class_names in ((), classes.names):
            start.name_classes(classes.names)
        else:
            start.replace_classes(classes.names or classes.count)
            if self.group.first and not resuming:
                kept = len(start.state_dict()) - 1
                say(
                    f"{self.config.init} has {known} classes, the data has {classes.count}: "
                    f"class_emb.weight is made anew but for the row of no class, {kept} other "
                    "tensors are kept"
                )
        start.change_drops(class_drop=wanted.class_drop, drop_path=wanted.drop_path)
        return start

    def _autocast(self) -> AbstractContextManager[Any]:
        # Split weights come in half precision already.
        precision = self.config.optim.precision
        return nullcontext() if self.sharded else autocast(precision, self.group.device)

    # -- a step -----------------------------------------------------------------------------------

    def batches(self, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the model takes: classes [B], tokens [B, L]."""
        workers, device = self.config.data.workers, self.group.device
        for pictures, classes in data.loader(
            self.dataset, self.partition, position, workers, labels.collate
        ):
            found = image_tokens.tokens(self.model.tokenizer, pictures, device)
            yield classes.to(device, non_blocking=True), found

    def micro_step(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        with self._autocast():
            loss = self.transformer.parallel(*batch).loss
        self.transformer.backward(loss)
        return {"loss": loss}

    # -- what people see --------------------------------------------------------------------------

    def _some(self, dataset: labels.Labelled) -> tuple[Tensor, Tensor]:
        """Classes [N] and tokens [N, L] that an evaluation looks at."""
        pictures, classes = labels.collate(dataset.some(self.config.data.evaluated))
        tokenizer, device = self.model.tokenizer, self.group.device
        parts = [
            image_tokens.tokens(tokenizer, part, device).cpu()
            for part in pictures.split(self.partition.local)
        ]
        return classes, torch.cat(parts)

    def evaluate(self) -> dict[str, float]:
        """Cross-entropy and share of right tokens, each token predicted from the true ones before.

        Of pictures that are trained on, and of held-out ones where there are any.
        """
        values: dict[str, float] = {}
        for name, (classes, known) in self.evaluated.items():

            def run(rows: list[int], target: Tensor, classes: Tensor = classes) -> Any:
                with self._autocast():
                    return self.model(classes[rows].to(target.device), target)

            found = image_tokens.score(known, run, self.group, self.partition.local)
            values |= dict(zip((f"{name}_loss", f"{name}_accuracy"), found, strict=True))
        return values

    def pictures(self) -> tuple[Tensor, Tensor]:
        """Training pictures as the tokenizer has them, and drawings of their classes."""
        config, (classes, known) = self.config, self.evaluated["known"]
        count = min(config.output.pictures, len(classes))
        which = [i * len(classes) // count for i in range(count)]
        target = known[which].to(self.group.device)
        drawn = target
        if self.group.first or self.sharded:  # split weights need each other
            drawn = self.model.generate_tokens(
                classes[which], sampling=config.sample, seed=config.seed
            )
        return image_tokens.decoded(self.model.tokenizer, target, drawn)

    def headline(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return (
            f"{count / 1e6:.2f} M parameters, {self.dataset.describe()}, "
            f"{self.model.config.image_tokens} tokens an image"
        )

    def listing(self) -> Iterator[str]:
        for one in self.sets.values():
            yield from one.source.listing()
        yield from self.dataset.classes.names

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        with torch.device("meta"):
            model = VAR(self.model.config, self.model.tokenizer)
        model.load_state_dict(weights, assign=True)
        model.save_pretrained(folder)

    def check(self, path: Path) -> None:
        saved, own = VAR.read_config(path), self.model.config
        if (saved.classes, saved.class_names) != (own.classes, own.class_names):
            raise CheckpointError(
                f"{path} has {saved.classes} classes, the data has {own.classes}, or others"
            )
        image_tokens.check_same(path, self.model.tokenizer, self.config.tokenizer)


def _by_decay(model: VAR) -> list[dict[str, Any]]:
    """The parameters in two groups: matrices of linear layers, which weight decay is for, and all
    others."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    known = {id(weight) for weight in decayed}
    others = [p for p in model.parameters() if id(p) not in known]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
