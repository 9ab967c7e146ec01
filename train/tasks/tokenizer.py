"""The training of a tokenizer: a step, the evaluation, and everything a checkpoint holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.profiler import record_function

from tokenflow_ext.models import (
    ConfigError,
    TokenFlowTokenizer,
    TokenizerConfig,
    TokenizerOutput,
)
from tokenflow_ext.models.losses.discriminators import (
    StyleGanDiscriminator,
    build_discriminator,
)
from tokenflow_ext.models.losses.tokenizer import (
    LPIPS,
    discriminator_loss,
    tokenizer_loss,
)
from tokenflow_ext.models.metrics import code_usage, cosine, psnr
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.towers.teachers import build_teacher
from tokenflow_ext.train import data
from tokenflow_ext.train.config import TrainConfig, leaves
from tokenflow_ext.train.data.images import open_images
from tokenflow_ext.train.engine import checkpoint, parallel
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.loop import BaseTrainer


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


class Trainer(BaseTrainer):
    """The run of a tokenizer."""

    shown = ("total", "l2", "semantic", "vq")
    names = {  # noqa: RUF012
        "psnr": ("PSNR", "{:.2f} dB"),
        "cosine": ("cosine to the teacher", "{:.3f}"),
        "usage": ("codes in use", "{:.1%}"),
        "perplexity": ("perplexity of the codes", "{:.0f}"),
    }

    def __init__(self, config: TrainConfig, group: Processes) -> None:
        super().__init__(config, group)
        self._seed(0)  # every process builds the same weights
        self.model = self._place(self._build(config).to(group.device))
        size = self.model.config.image_size

        joint = config.optim.batch // config.optim.accumulate
        source, held_out = open_images(config.data, joint, config.seed)
        self.dataset = data.RandomCrops(source, size, config.data, config.seed)
        self._held_out_names = list(data.listing(held_out))
        self.held_out = data.held_out_crops(held_out, size, config.data.held_out_crops)

        loss = config.loss
        self.teacher = self._build_teacher(config)
        # A frozen tower that is the teacher itself need not run twice.
        self.tower_is_teacher = (
            self.teacher is not None
            and config.pretrained_tower
            and config.init is None
            and config.model.semantic.frozen
            and config.model.semantic.tower == config.model.teacher
        )
        self.perceptual = None
        if loss.perceptual > 0:
            self.perceptual = LPIPS(loss.perceptual_weights).to(group.device)
        self.discriminator = None
        if loss.gan > 0:
            self.discriminator = self._build_discriminator(size).to(group.device)
        optim = config.optim
        codebooks = set(self.model.quantizer.codebooks)  # by moving averages they move untrained
        moving = {
            name: p
            for name, p in self.model.named_parameters()
            if p.requires_grad or p in codebooks
        }
        self.average = parallel.Average(moving, optim.ema_decay)
        self.optimizer, self.scheduler = self._optimizer(self._rates(), optim.lr)
        if self.discriminator is not None:
            self.d_optimizer, self.d_scheduler = self._optimizer(
                self.discriminator.parameters(), optim.discriminator_lr, loss.gan_start
            )
        self.d_scaler = self._scaler()
        self._seed(1 + group.rank)  # from here on every process draws its own numbers

    def _build(self, config: TrainConfig) -> TokenFlowTokenizer:
        """The tokenizer as training starts with it."""
        if config.init is not None:
            model, _ = checkpoint.load_tokenizer(config.init)
        else:
            check_memory(config.model)
            model = TokenFlowTokenizer(config.model)
            if config.pretrained_tower:
                model.load_semantic_tower(config.teacher_weights)
        self._freeze(model)
        return model.train()

    def _build_teacher(self, config: TrainConfig) -> nn.Module | None:
        wanted = self.model.config.teacher
        if not (config.loss.semantic > 0 and wanted.enabled):
            return None
        teacher = build_teacher(wanted, weights=config.teacher_weights)
        # Channels last: depthwise convolutions take half the time on a CPU.
        return teacher.to(self.group.device, memory_format=torch.channels_last)

    def _build_discriminator(self, size: int) -> nn.Module:
        loss = self.config.loss
        model = build_discriminator(loss.discriminator, size, loss.discriminator_channels)
        if isinstance(model, StyleGanDiscriminator) and self.partition.local % model.group:
            raise ConfigError(
                f"loss.discriminator=stylegan compares images in groups of {model.group}: "
                "optim.batch must give each process and accumulation step a multiple of that, got "
                f"{self.partition.local}"
            )
        return model

    def _freeze(self, model: TokenFlowTokenizer) -> None:
        """Parts whose learning rate is 0 take no gradient."""
        for part, parameters in model.parts().items():
            if not getattr(self.config.optim.lr_scale, part):
                for parameter in parameters:
                    parameter.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("optim.lr_scale leaves nothing to train: every part has 0")

    def _place(self, model: TokenFlowTokenizer) -> TokenFlowTokenizer:
        """The model as this run computes it: recomputed, compiled, split over processes."""
        if self.config.checkpointing:
            model.checkpoint_activations()
        if self.config.compile:
            model.compile_networks()
        self._split(model)
        return model

    def _split(self, model: TokenFlowTokenizer) -> None:
        if self.config.parallel == "fsdp" and self.group.world > 1:
            # The codebooks are searched as a whole. Gathered weights stay in float32, under
            # autocast like those of DDP, so that the numbers are DDP's.
            codebooks = list(model.quantizer.codebooks)
            parallel.split_weights(model, model.blocks(), self.group, kept=codebooks)
            register_fsdp_forward_method(model, "features")

    def _rates(self) -> list[dict[str, Any]]:
        """The trained parameters, grouped by part, and each group's learning rate."""
        optim = self.config.optim
        groups = []
        for part, parameters in self.model.parts().items():
            trained = [p for p in parameters if p.requires_grad]
            if trained:
                rate = optim.lr * getattr(optim.lr_scale, part)
                groups.append({"params": trained, "lr": rate, "name": part})
        return groups

    def _distribute_model(self) -> nn.Module:
        # A loss that is switched off leaves the weights behind it without a gradient.
        loss = self.config.loss
        weights = {"semantic": loss.semantic, "pixel": loss.pixel + loss.perceptual}
        branches = self.model.config.branches
        complete = min(loss.vq, *(weights[branch] for branch in branches)) > 0
        return parallel.distribute(self.model, self.group, find_unused_parameters=not complete)

    def prepare(self) -> None:
        """Set the codebooks by k-means if the run is new, wrap the models, start reading."""
        if self.step == 0 and self.config.init is None and self.config.codebook.kmeans_batches:
            self._start_codebooks()
        self.parallel = self._distribute_model()
        if self.discriminator is not None:
            self.d_parallel = parallel.distribute(self.discriminator, self.group)
        self._start_reading(self._read(self.position, self.config.data.workers))

    def _read(self, position: int, workers: int = 0) -> Iterator[Tensor]:
        return iter(data.loader(self.dataset, self.partition, position, workers))

    def _next_batch(self) -> tuple[Tensor, Tensor | None]:
        """The next micro-batch, and the teacher's tokens of it."""
        images = next(self._batches).to(self.group.device, non_blocking=True)
        if self.teacher is None:
            return images, None
        with self._autocast(), record_function("teacher"):
            return images, self.teacher(images)

    @torch.no_grad()
    def _start_codebooks(self) -> None:
        codebook = self.config.codebook
        batches = self._read(0)
        count = codebook.kmeans_batches * self.config.optim.accumulate
        images = (next(batches).to(self.group.device) for _ in range(count))
        h = torch.cat([self._features(batch) for batch in images])
        # The residuals of finer scales depend on the codes of coarser ones: with random codes the
        # first round meets none worth the name, the second meets real ones.
        for _ in range(2):
            rows = self.model.quantizer.rows(h)
            self.model.quantizer.init_kmeans(rows, iterations=codebook.kmeans_iterations)
        for average, codebook in self._codebooks():
            average.copy_(codebook)  # a code that was set anew has no past worth averaging with

    def _features(self, images: Tensor) -> Tensor:
        """Features of the model in evaluation."""
        with self._evaluating() as model:
            return model.features(images)

    @contextmanager
    def _evaluating(self) -> Iterator[TokenFlowTokenizer]:
        # Compiling anew for the batches of an evaluation would take longer than it saves.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with eager, super()._evaluating() as model:
            yield model

    def _codebooks(self) -> list[tuple[Tensor, nn.Parameter]]:
        """Each codebook's moving average and the codebook."""
        weights, codebooks = self.average.weights, self.model.quantizer.codebooks
        return [(weights[f"quantizer.codebooks.{i}"], c) for i, c in enumerate(codebooks)]

    # -- one step ---------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step over every micro-batch; returns the losses of this process."""
        optim = self.config.optim
        adversarial = self.discriminator is not None and self.step >= self.config.loss.gan_start
        values: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        if adversarial:
            self.d_optimizer.zero_grad(set_to_none=True)
        for micro in range(optim.accumulate):
            images, target = self._take_batch()
            last = micro == optim.accumulate - 1
            with parallel.exchange(self.parallel, last):
                made, parts = self._generator(images, target, adversarial)
            if adversarial:
                with parallel.exchange(self.d_parallel, last), record_function("discriminator"):
                    parts |= self._discriminator(images, made)
            for name, value in parts.items():
                values[name] = values.get(name, 0.0) + value.detach().float() / optim.accumulate
        if parallel.is_split(self.model):
            parallel.average_gradients(self.model.quantizer.codebooks, self.group)
        values["grad_norm"] = self._update(self.model.parameters(), self.optimizer, self.scaler)
        self.scheduler.step()
        if adversarial:
            self._update(self.discriminator.parameters(), self.d_optimizer, self.d_scaler)
            self.d_scheduler.step()
        self.step += 1
        self.position += optim.batch
        with record_function("average"):
            self.average.update(self.step)
        self._restart()
        return values

    def _generator(
        self, images: Tensor, target: Any, adversarial: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Forward and backward of the tokenizer: its images (without graph) and its losses.

        Args:
            target: what came with the images from :meth:`_next_batch`.
        """
        loss = self.config.loss
        with self._autocast():
            out = self._forward(images, target)
            logits = None
            if adversarial:
                self.discriminator.requires_grad_(False)
                logits = self.discriminator(out.images)
                self.discriminator.requires_grad_(True)
            parts = tokenizer_loss(
                out,
                images,
                perceptual=self.perceptual,
                fake_logits=logits,
                l2_weight=loss.pixel,
                perceptual_weight=loss.perceptual,
                generator_weight=loss.gan,
                generator_kind=loss.generator_loss,
                adaptive_layer=self.model.last_layer if loss.gan_adaptive else None,
                **self._other_losses(target),
            )
        with record_function("backward"):
            self.scaler.scale(parts.total / self.config.optim.accumulate).backward()
        return None if out.images is None else out.images.detach(), parts._asdict()

    def _forward(self, images: Tensor, target: Tensor | None) -> TokenizerOutput:
        return self.parallel(images, target if self.tower_is_teacher else None)

    def _other_losses(self, target: Tensor | None) -> dict[str, Any]:
        """Arguments of the losses beside those of the images."""
        loss = self.config.loss
        return {
            "teacher": target,
            "semantic_kind": loss.semantic_kind,
            "semantic_weight": loss.semantic,
            "vq_weight": loss.vq,
        }

    def _discriminator(self, images: Tensor, made: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            real, fake = self.d_parallel(torch.cat([images, made])).chunk(2)
            value = discriminator_loss(real, fake, self.config.loss.discriminator_loss)
        self.d_scaler.scale(value / self.config.optim.accumulate).backward()
        return {"discriminator": value}

    @torch.no_grad()
    def _restart(self) -> None:
        codebook, steps = self.config.codebook, self.config.optim.steps
        every = codebook.restart_every
        if not every or self.step % every or self.step > codebook.restart_until * steps:
            return
        images = next(self._read(self.position)).to(self.group.device)
        rows = self.model.quantizer.rows(self._features(images))
        before = [c.detach().clone() for c in self.model.quantizer.codebooks]
        self.model.quantizer.restart_dead_codes(rows, threshold=codebook.restart_threshold)
        for (average, code), old in zip(self._codebooks(), before, strict=True):
            anew = (code != old).any(dim=1, keepdim=True)
            average.copy_(torch.where(anew, code, average))

    # -- what people and files see ----------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The averaged weights on the held-out crops: PSNR in dB (mean over images) with a pixel
        branch, cosine of decoded and teacher's tokens with a teacher, share of the codes in use and
        their perplexity."""
        group, local = self.group, self.partition.local
        codes = self.model.config.quantizer.codebook_size
        hits = torch.zeros(codes, dtype=torch.int64, device=group.device)
        sums = torch.zeros(3, dtype=torch.float64, device=group.device)
        with self._ready() as model:
            for start in range(0, len(self.held_out), local * group.world):
                # A process without a share still takes part: its weights may be needed elsewhere.
                own = self.held_out[start : start + local * group.world][group.rank :: group.world]
                images = (own if len(own) else self.held_out[:1]).to(group.device)
                out = model(images)
                if len(own):
                    hits += torch.bincount(out.quantizer.indices.flatten(), minlength=codes)
                    if out.images is not None:
                        sums[0] += psnr(out.images, images, reduction="none").double().sum()
                    if self.teacher is not None:
                        close = cosine(out.semantic, self.teacher(images)).double()
                        sums[1] += close * len(images)
                    sums[2] += len(images)
        group.sum_(hits)
        group.sum_(sums)
        values = {}
        if self.model.config.pixel.enabled:
            values["psnr"] = (sums[0] / sums[2]).item()
        if self.teacher is not None:
            values["cosine"] = (sums[1] / sums[2]).item()
        values["usage"], values["perplexity"] = code_usage(hits)
        return values

    @torch.no_grad()
    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """Held-out crops spread over the set, and what the averaged weights make of them; None
        without a pixel branch."""
        if not self.model.config.pixel.enabled:
            return None
        count = min(self.config.output.pictures, len(self.held_out))
        which = torch.linspace(0, len(self.held_out) - 1, count).round().long()
        images = self.held_out[which].to(self.group.device)
        with self._ready() as model:
            return images, model(images).images

    # -- checkpoints ------------------------------------------------------------------------------

    def _save_model(self, weights: dict[str, Tensor], folder: Path) -> None:
        self.model.save_pretrained(folder, weights)

    def _further_state(self) -> dict[str, Any]:
        if self.discriminator is None:
            return {}
        return {
            "discriminator": {
                "model": self.discriminator.state_dict(),
                "optimizer": self.d_optimizer.state_dict(),
                "scheduler": self.d_scheduler.state_dict(),
                "scaler": self.d_scaler.state_dict(),
            }
        }

    def _restore_further(self, state: dict[str, Any]) -> None:
        if self.discriminator is not None and "discriminator" in state:
            other = state["discriminator"]
            parallel.load_model_state(self.discriminator, other["model"])
            parallel.load_optimizer_state(self.d_optimizer, other["optimizer"])
            parallel.load_scheduler_state(self.d_scheduler, other["scheduler"])
            if other["scaler"]:
                self.d_scaler.load_state_dict(other["scaler"])

    def _check(self, path: Path) -> None:
        saved = TokenFlowTokenizer.read_config(path)
        theirs, ours = leaves(saved.to_dict()), leaves(self.model.config.to_dict())
        other = [key for key in ours if theirs[key] != ours[key]]
        if other:
            raise checkpoint.CheckpointError(
                f"{path} does not fit this run's configuration: model.{other[0]} is "
                f"{shown(theirs[other[0]])} there, {shown(ours[other[0]])} here"
            )

    def _listing(self) -> Iterator[str]:
        yield from self.dataset.source.listing()
        yield from self._held_out_names

    # -- what people see --------------------------------------------------------------------------

    def headline(self) -> str:
        rates = [
            f"  {part:17s}{sum(p.numel() for p in parameters) / 1e6:9.2f} M  {self._rate(part)}"
            for part, parameters in self.model.parts().items()
        ]
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return "\n".join(
            [
                *rates,
                f"{count / 1e6:.2f} M trained parameters, {self.dataset.describe()}, "
                f"{len(self.held_out)} held-out crops",
            ]
        )

    def _rate(self, part: str) -> str:
        for group in self.optimizer.param_groups:
            if group["name"] == part:
                return f"lr {group['initial_lr']:.2g}"
        moved = part == "codebooks" and self.model.config.quantizer.codebook_update == "ema"
        return "by moving averages" if moved else "frozen"

    def _extra_values(self) -> dict[str, float]:
        """Share of the codes in use by their moving average of hits."""
        hits = self.model.quantizer.usage_ema
        return {"usage": (hits > hits.sum() * 1e-3 / len(hits)).double().mean().item()}

    def _summary_facts(self) -> dict[str, int]:
        return {"held_out_crops": len(self.held_out)}

    def summary_text(self, summary: dict[str, Any]) -> str:
        return super().summary_text(summary, f"{len(self.held_out)} held-out crops")
