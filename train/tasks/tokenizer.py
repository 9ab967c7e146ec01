"""The training of a tokenizer: semantic and pixel branch, codebooks, and a discriminator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.profiler import record_function

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import CheckpointError, ConfigError, TokenFlowTokenizer, TokenizerConfig
from tokenflow_ext.models.losses.tokenizer import tokenizer_loss
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.tokenizer.family_quantizer import FamilyQuantizer
from tokenflow_ext.models.towers.teachers import build_teacher
from tokenflow_ext.train.config import DecoderConfig, TrainConfig, leaves
from tokenflow_ext.train.data import BatchPartition
from tokenflow_ext.train.data.text_files import say
from tokenflow_ext.train.engine import checkpoint, parallel
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.ema import EMA
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.optimization import OptimizedModel, autocast
from tokenflow_ext.train.engine.random_state import seed_generators, undrawn
from tokenflow_ext.train.engine.task import Task

from .crops import METRICS, CropData
from .pixel_loss import PixelLoss


def check_memory(config: TokenizerConfig) -> None:
    """That the weights of a tokenizer fit into this machine's memory.

    Raises:
        ConfigError: they do not.
    """
    with torch.device("meta"):
        weights = TokenFlowTokenizer(config).state_dict()
    needed = sum(value.nbytes for value in weights.values()) / 2**30
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > there:
        raise ConfigError(
            f"model asks for {needed:.1f} GiB of weights, and this machine has {there:.1f} GiB of "
            "memory: make its widths, depths or codebook_size smaller"
        )


class TokenizerTask(Task):
    """A tokenizer that learns to reconstruct images and a teacher's tokens."""

    progress = ("total", "l2", "semantic", "vq")
    evaluation = ("held_out", "held out")
    metrics = METRICS

    def __init__(self, config: TrainConfig, group: Processes, resuming: bool = False) -> None:
        self.config, self.group = config, group
        optim = config.optim
        partition = BatchPartition(optim.batch, optim.accumulate, group.rank, group.world)
        seed_generators(config.seed, 0)
        self.model: TokenFlowTokenizer = self._build(resuming).to(group.device)
        self._place()
        size = self.model.config.image_size
        self.crops = CropData(config.data, size, config.seed, partition)
        self.dataset = self.crops.dataset
        self.teacher = self._build_teacher()
        # A frozen tower that is the teacher itself need not run twice.
        self.tower_is_teacher = (
            self.teacher is not None
            and config.pretrained_tower
            and config.init is None
            and config.model.semantic.frozen
            and config.model.semantic.tower == config.model.teacher
        )
        self.pixel_loss = PixelLoss(config.loss, optim, size, partition, group)
        # Those that k-means and restarts set; signs, levels and projected tables have none.
        self._codebooks = list(self.model.quantizer.codebooks)
        moved = set(self._codebooks)  # by moving averages they move untrained
        self.ema: EMA = EMA(
            {n: p for n, p in self.model.named_parameters() if p.requires_grad or p in moved},
            optim.ema_decay,
        )
        self.generator = OptimizedModel(
            self.model,
            self._learning_rates(),
            optim.lr,
            optim,
            group,
            kept=self._codebooks,
            find_unused=not self._every_weight_learns(),
        )
        self.optimized = {"model": self.generator, **self.pixel_loss.optimized()}

    # -- the model --------------------------------------------------------------------------------

    def _build(self, resuming: bool) -> TokenFlowTokenizer:
        """The tokenizer as training starts with it."""
        config = self.config
        if config.init is not None:
            model, _ = checkpoint.load_tokenizer(config.init)
        else:
            check_memory(config.model)
            with undrawn(resuming):
                model = TokenFlowTokenizer(config.model)
            if config.pretrained_tower and not resuming:
                model.load_semantic_tower(config.teacher_weights)
        for part, parameters in model.parts().items():
            if not getattr(config.optim.lr_scale, part):
                for parameter in parameters:
                    parameter.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("optim.lr_scale leaves nothing to train: every part has 0")
        return model.train()

    def _build_teacher(self) -> nn.Module | None:
        wanted = self.model.config.teacher
        if not (self.config.loss.semantic > 0 and wanted.enabled):
            return None
        teacher = build_teacher(wanted, weights=self.config.teacher_weights)
        # Channels last: depthwise convolutions take half the time on a CPU.
        teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return teacher.to(self.group.device)

    def _place(self) -> None:
        """The model as this run computes it: recomputed, compiled, split over processes."""
        config, model = self.config, self.model
        if config.checkpointing:
            model.checkpoint_activations()
        if config.compile:
            model.compile_networks()
        if config.parallel == "fsdp" and self.group.world > 1:
            # The codebooks are searched as a whole. Gathered weights stay in float32, under
            # autocast like those of DDP, so that the numbers are DDP's.
            codebooks = list(model.quantizer.codebooks)
            parallel.split_weights(model, model.blocks(), self.group, kept=codebooks)
            register_fsdp_forward_method(model, "features")

    def _learning_rates(self) -> list[dict[str, Any]]:
        """The trained parameters, grouped by part, and each group's learning rate."""
        optim = self.config.optim
        groups = []
        for part, parameters in self.model.parts().items():
            trained = [p for p in parameters if p.requires_grad]
            if trained:
                rate = optim.lr * getattr(optim.lr_scale, part)
                groups.append({"params": trained, "lr": rate, "name": part})
        return groups

    def _every_weight_learns(self) -> bool:
        """A loss that is switched off leaves the weights behind it without a gradient."""
        loss = self.config.loss
        weights = {"semantic": loss.semantic, "pixel": loss.pixel + loss.perceptual}
        return min(loss.vq, *(weights[branch] for branch in self.model.config.branches)) > 0

    # -- a step -----------------------------------------------------------------------------------

    def batches(self, position: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images [B, 3, S, S], and the teacher's tokens of them [B, N, C]."""
        optim, device = self.config.optim, self.group.device
        for crops in self.crops.batches(position, self.config.data.workers):
            images, target = crops.to(device, non_blocking=True), None
            if self.teacher is not None:
                with autocast(optim.precision, device), record_function("teacher"):
                    target = self.teacher(images)
            yield images, target

    def micro_step(self, batch: tuple[Tensor, Tensor | None], step: int) -> dict[str, Tensor]:
        images, target = batch
        loss = self.config.loss
        with autocast(self.config.optim.precision, self.group.device):
            out = self.generator.parallel(images, target if self.tower_is_teacher else None)
            losses = tokenizer_loss(
                out,
                images,
                teacher=target,
                semantic_kind=loss.semantic_kind,
                semantic_weight=loss.semantic,
                vq_weight=loss.vq,
                **self.pixel_loss.generator_terms(out.images, self.model.last_layer, step),
            )
        with record_function("backward"):
            self.generator.backward(losses.total)
        if out.images is None:  # no pixel branch, no discriminator
            return losses._asdict()
        made = out.images.detach()
        return losses._asdict() | self.pixel_loss.train_discriminator(images, made, step)

    # -- codebooks --------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self) -> None:
        """Set the codes by k-means on the features of the first batches."""
        codebook = self.config.codebook
        if self.config.init is not None or not codebook.kmeans_batches:
            return
        if not self._codebooks:
            say(f"codebook.kmeans_batches={codebook.kmeans_batches} sets nothing: no codes to set")
            return
        batches = self.crops.batches(0)
        count = codebook.kmeans_batches * self.config.optim.accumulate
        images = (next(batches).to(self.group.device) for _ in range(count))
        h = torch.cat([self._features(batch) for batch in images])
        # The residuals of finer scales depend on the codes of coarser ones: with random codes the
        # first round meets none worth the name, the second meets real ones.
        for _ in range(2):
            rows = self.model.quantizer.rows(h)
            self.model.quantizer.init_kmeans(rows, iterations=codebook.kmeans_iterations)
        for average, code in self.averaged_codebooks():
            average.copy_(code)  # a code that was set anew has no past worth averaging with

    @torch.no_grad()
    def after_step(self, step: int, position: int) -> None:
        """Set codes that are hardly used anew, to features of the next batch."""
        codebook, steps = self.config.codebook, self.config.optim.steps
        every = codebook.restart_every
        if not every or step % every or step > codebook.restart_until * steps:
            return
        images = next(self.crops.batches(position)).to(self.group.device)
        rows = self.model.quantizer.rows(self._features(images))
        if codebook.restart_rows == "by_scale":
            rows = self._evenly_by_scale(rows)
        before = [c.detach().clone() for c in self._codebooks]
        self.model.quantizer.restart_dead_codes(rows, threshold=codebook.restart_threshold)
        for (average, code), old in zip(self.averaged_codebooks(), before, strict=True):
            anew = (code != old).any(dim=1, keepdim=True)
            average.copy_(torch.where(anew, code, average))

    def _evenly_by_scale(self, rows: Tensor) -> Tensor:
        """Of rows [B * L, D] as many of each scale, as far as there are: a coarse scale has few
        among all, and codes that are set anew to others' rows leave it as it was."""
        quantizer = self.model.quantizer
        parts = rows.unflatten(0, (-1, quantizer.num_tokens)).split(
            quantizer.tokens_per_scale, dim=1
        )
        most = -(-quantizer.codebook_size // len(parts))
        flat = [part.flatten(0, 1) for part in parts]
        return torch.cat([part[torch.randperm(len(part))[:most]] for part in flat])

    def _features(self, images: Tensor) -> Tensor:
        """Features [B, C, h, w] of the model in evaluation."""
        with eager(self.config), parallel.evaluating(self.model):
            return self.model.features(images)

    def averaged_codebooks(self) -> list[tuple[Tensor, nn.Parameter]]:
        """Each codebook's moving average and the codebook, [K, C]."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [(self.ema.weights[names[codebook]], codebook) for codebook in self._codebooks]

    # -- what people see --------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """See :meth:`CropData.evaluate`."""
        with eager(self.config):
            return self.crops.evaluate(self.model, self.group, self.teacher)

    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """Held-out crops and their reconstructions; None without a pixel branch."""
        if not self.model.config.pixel.enabled:
            return None
        images = self.crops.some_held_out(self.config.output.pictures).to(self.group.device)
        with eager(self.config):
            return images, self.model(images).images

    def headline(self) -> str:
        by_average = self.model.config.quantizer.codebook_update == "ema"
        return headline(self.model, self.generator, self.crops, by_average)

    def step_values(self) -> dict[str, float]:
        """Share of the codes in use by their moving average of hits, by group where each has an
        index of its own, and the losses of a quantizer of the family by name."""
        quantizer = self.model.quantizer
        hits = quantizer.usage_ema

        def share(part: Tensor) -> float:
            return (part > part.sum() * 1e-3 / len(part)).double().mean().item()

        values = {"usage": share(hits)}
        if len(groups := hits.split(quantizer.codes_per_group)) > 1:
            values |= {f"usage_group_{i}": share(part) for i, part in enumerate(groups, start=1)}
        if isinstance(quantizer, FamilyQuantizer):
            losses = quantizer.last_losses.items()
            values |= {f"quantizer_{name}": loss.item() for name, loss in losses}
        return values

    def summary(self) -> dict[str, Any]:
        return {"held_out_crops": len(self.crops.held_out)}

    def summary_head(self) -> str:
        return f"{len(self.crops.held_out)} held-out crops"

    def listing(self) -> Iterator[str]:
        return self.crops.listing()

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        self.model.save_pretrained(folder, weights)

    def check(self, path: Path) -> None:
        check_same_model(path, self.model.config)


def eager(config: TrainConfig | DecoderConfig) -> AbstractContextManager[Any]:
    """For an evaluation: compiling anew for its batches would take longer than it saves."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


def check_same_model(path: Path, config: TokenizerConfig) -> None:
    """That the checkpoint at ``path`` is of a tokenizer of this configuration.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    saved = TokenFlowTokenizer.read_config(path)
    theirs, ours = leaves(saved.to_dict()), leaves(config.to_dict())
    other = [key for key in ours if theirs[key] != ours[key]]
    if other:
        raise CheckpointError(
            f"{path} does not fit this run's configuration: model.{other[0]} is "
            f"{shown(theirs[other[0]])} there, {shown(ours[other[0]])} here"
        )


def headline(
    model: TokenFlowTokenizer,
    optimized: OptimizedModel,
    crops: CropData,
    codes_by_average: bool = False,
) -> str:
    """The parts of a tokenizer, each with its size and learning rate, and what it trains on.

    Args:
        codes_by_average: codebooks follow the features they are nearest to, without an optimizer.
    """
    rates = {g["name"]: f"lr {g['initial_lr']:.2g}" for g in optimized.optimizer.param_groups}
    if codes_by_average:
        rates.setdefault("codebooks", "by moving averages")
    lines = [
        f"  {part:17s}{sum(p.numel() for p in parameters) / 1e6:9.2f} M  "
        f"{rates.get(part, 'frozen')}"
        for part, parameters in model.parts().items()
    ]
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines.append(
        f"{count / 1e6:.2f} M trained parameters, {crops.dataset.describe()}, "
        f"{len(crops.held_out)} held-out crops"
    )
    return "\n".join(lines)


def tokenizer_trainer(config: TrainConfig, group: Processes) -> Trainer:
    """The run of a tokenizer, as the class ``Trainer`` of before gave it."""
    return Trainer(config, group, TokenizerTask)


__getattr__ = renamed(__name__, {"Trainer": "tokenizer_trainer"})
