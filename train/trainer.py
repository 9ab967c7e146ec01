"""The training of a tokenizer: a step, the evaluation, and everything a checkpoint holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.discriminators import PatchDiscriminator
from tokenflow_ext.models.losses import LPIPS, hinge_d_loss, tokenizer_loss
from tokenflow_ext.models.metrics import code_usage, cosine, psnr
from tokenflow_ext.models.teachers import build_teacher
from tokenflow_ext.train import checkpoint, data
from tokenflow_ext.train.config import TrainConfig, to_yaml
from tokenflow_ext.train.distributed import Processes
from tokenflow_ext.train.images import open_images
from tokenflow_ext.train.loop import BaseTrainer


class Ema:
    """A copy of a model whose weights follow the model's by an exponential moving average.

    The decay starts low, as (1 + t) / (10 + t), so that the first steps are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow ``model`` after optimizer step ``step`` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for a, b in zip(self.model.buffers(), model.buffers(), strict=True):
            a.copy_(b)


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
        size = config.model.image_size

        joint = config.optim.batch // config.optim.accumulate
        source, held_out = open_images(config.data, joint, config.seed)
        self.dataset = data.RandomCrops(source, size, config.data, config.seed)
        self.held_out = data.held_out_crops(held_out, size, config.data.held_out_crops)

        self._seed(0)  # every process builds the same weights
        if config.init is None:
            model = TokenFlowTokenizer(config.model)
            if config.pretrained_tower:
                model.load_semantic_tower(config.teacher_weights)
        else:
            model = TokenFlowTokenizer.from_pretrained(config.init)
        self.model = model.to(group.device).train()
        loss = config.loss
        self.teacher = None
        if loss.semantic > 0 and config.model.teacher.enabled:
            teacher = build_teacher(config.model.teacher, weights=config.teacher_weights)
            # Channels last: depthwise convolutions take half the time on a CPU.
            self.teacher = teacher.to(group.device, memory_format=torch.channels_last)
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
            self.discriminator = PatchDiscriminator().to(group.device)
        self.ema = Ema(self.model, config.optim.ema_decay)

        optim = config.optim
        self.optimizer, self.scheduler = self._optimizer(self.model, optim.lr)
        if self.discriminator is not None:
            self.d_optimizer, self.d_scheduler = self._optimizer(
                self.discriminator, optim.discriminator_lr, loss.gan_start
            )
        self.d_scaler = self._scaler()
        self._seed(1 + group.rank)  # from here on every process draws its own numbers

    def _distribute(self, module: nn.Module) -> nn.Module:
        if self.group.world == 1:
            return module
        devices = [self.group.device] if self.group.device.type == "cuda" else None
        # A loss that is switched off leaves the weights behind it without a gradient.
        loss = self.config.loss
        complete = min(loss.semantic, loss.pixel + loss.perceptual, loss.vq) > 0
        return DistributedDataParallel(
            module, device_ids=devices, find_unused_parameters=not complete
        )

    def prepare(self) -> None:
        """Set the codebooks by k-means if the run is new, wrap the models, start reading."""
        if self.step == 0 and self.config.init is None and self.config.codebook.kmeans_batches:
            self._start_codebooks()
        self.parallel = self._distribute(self.model)
        if self.discriminator is not None:
            self.d_parallel = self._distribute(self.discriminator)
        self._start_reading(self._read(self.position, self.config.data.workers))

    def _read(self, position: int, workers: int = 0) -> Iterator[Tensor]:
        return iter(data.loader(self.dataset, self.shard, position, workers))

    def _next_batch(self) -> tuple[Tensor, Tensor | None]:
        """The next micro-batch, and the teacher's tokens of it."""
        images = next(self._batches).to(self.group.device, non_blocking=True)
        if self.teacher is None:
            return images, None
        with self._autocast():
            return images, self.teacher(images)

    @torch.no_grad()
    def _start_codebooks(self) -> None:
        codebook = self.config.codebook
        batches = self._read(0)
        count = codebook.kmeans_batches * self.config.optim.accumulate
        self.model.eval()
        images = (next(batches).to(self.group.device) for _ in range(count))
        h = torch.cat([self.model.features(batch) for batch in images])
        self.model.train()
        # The residuals of finer scales depend on the codes of coarser ones: with random codes the
        # first round meets none worth the name, the second meets real ones.
        for _ in range(2):
            rows = self.model.quantizer.rows(h)
            self.model.quantizer.init_kmeans(rows, iterations=codebook.kmeans_iterations)
        self._copy_codebooks()

    @torch.no_grad()
    def _copy_codebooks(self) -> None:
        """A code that was set anew has no past worth averaging with."""
        pairs = zip(self.ema.model.quantizer.codebooks, self.model.quantizer.codebooks, strict=True)
        for mine, theirs in pairs:
            mine.copy_(theirs)

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
            with self._no_sync(self.parallel, last):
                made, parts = self._generator(images, target, adversarial)
            if adversarial:
                with self._no_sync(self.d_parallel, last):
                    parts |= self._discriminator(images, made)
            for name, value in parts.items():
                values[name] = values.get(name, 0.0) + value.detach().float() / optim.accumulate
        values["grad_norm"] = self._update(self.model, self.optimizer, self.scaler)
        self.scheduler.step()
        if adversarial:
            self._update(self.discriminator, self.d_optimizer, self.d_scaler)
            self.d_scheduler.step()
        self.step += 1
        self.position += optim.batch
        self.ema.update(self.model, self.step)
        self._restart()
        return values

    def _no_sync(self, module: nn.Module, last: bool) -> Any:
        return nullcontext() if last or self.group.world == 1 else module.no_sync()

    def _generator(
        self, images: Tensor, target: Tensor | None, adversarial: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of the tokenizer: its images (without graph) and its losses."""
        loss = self.config.loss
        with self._autocast():
            out = self.parallel(images, target if self.tower_is_teacher else None)
            logits = None
            if adversarial:
                self.discriminator.requires_grad_(False)
                logits = self.discriminator(out.images)
                self.discriminator.requires_grad_(True)
            parts = tokenizer_loss(
                out,
                images,
                target,
                perceptual=self.perceptual,
                fake_logits=logits,
                semantic_kind=loss.semantic_kind,
                semantic_weight=loss.semantic,
                vq_weight=loss.vq,
                l2_weight=loss.pixel,
                perceptual_weight=loss.perceptual,
                generator_weight=loss.gan,
                adaptive_layer=self.model.last_layer if loss.gan_adaptive else None,
            )
        self.scaler.scale(parts.total / self.config.optim.accumulate).backward()
        return out.images.detach(), parts._asdict()

    def _discriminator(self, images: Tensor, made: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            real, fake = self.d_parallel(torch.cat([images, made])).chunk(2)
            value = hinge_d_loss(real, fake)
        self.d_scaler.scale(value / self.config.optim.accumulate).backward()
        return {"discriminator": value}

    @torch.no_grad()
    def _restart(self) -> None:
        codebook, steps = self.config.codebook, self.config.optim.steps
        every = codebook.restart_every
        if not every or self.step % every or self.step > codebook.restart_until * steps:
            return
        images = next(self._read(self.position)).to(self.group.device)
        self.model.eval()
        rows = self.model.quantizer.rows(self.model.features(images))
        self.model.train()
        before = [c.detach().clone() for c in self.model.quantizer.codebooks]
        self.model.quantizer.restart_dead_codes(rows, threshold=codebook.restart_threshold)
        mine, theirs = self.ema.model.quantizer.codebooks, self.model.quantizer.codebooks
        for average, code, old in zip(mine, theirs, before, strict=True):
            anew = (code != old).any(dim=1, keepdim=True)
            average.copy_(torch.where(anew, code, average))

    # -- what people and files see ----------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The EMA weights on the held-out crops: PSNR in dB (mean over images), cosine of decoded
        and teacher's tokens, share of the codes in use and their perplexity."""
        model, group = self.ema.model, self.group
        codes = self.config.model.quantizer.codebook_size
        hits = torch.zeros(codes, dtype=torch.int64, device=group.device)
        sums = torch.zeros(3, dtype=torch.float64, device=group.device)
        mine = self.held_out[group.rank :: group.world]
        for images in mine.split(self.shard.local) if len(mine) else ():
            images = images.to(group.device)
            indices = model.encode(images)
            made, semantic = model.decode(indices)
            hits += torch.bincount(indices.flatten(), minlength=codes)
            sums[0] += psnr(made, images, reduction="none").double().sum()
            if self.teacher is not None:
                sums[1] += cosine(semantic, self.teacher(images)).double() * len(images)
            sums[2] += len(images)
        group.sum_(hits)
        group.sum_(sums)
        values = {"psnr": (sums[0] / sums[2]).item()}
        if self.teacher is not None:
            values["cosine"] = (sums[1] / sums[2]).item()
        values["usage"], values["perplexity"] = code_usage(hits)
        return values

    @torch.no_grad()
    def pictures(self) -> tuple[Tensor, Tensor]:
        """Held-out crops spread over the set, and what the EMA weights make of them."""
        count = min(self.config.output.pictures, len(self.held_out))
        which = torch.linspace(0, len(self.held_out) - 1, count).round().long()
        images = self.held_out[which].to(self.group.device)
        return images, self.ema.model.decode(self.ema.model.encode(images))[0]

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint (every process must call this; the first one writes)."""
        states = self.group.gather(self._random_states())
        if not self.group.first:
            return None
        state = {
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "first": self.first,
            "config": to_yaml(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": states,
        }
        if self.discriminator is not None:
            state["discriminator"] = {
                "model": self.discriminator.state_dict(),
                "optimizer": self.d_optimizer.state_dict(),
                "scheduler": self.d_scheduler.state_dict(),
                "scaler": self.d_scaler.state_dict(),
            }
        folder = self.run / "checkpoints"
        return checkpoint.save(
            folder, self.step, state, self.ema.model.save_pretrained, self.config.output.keep
        )

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``.

        Raises:
            CheckpointError: not whole, or of another model.
        """
        state = checkpoint.load(path)
        try:
            self.model.load_state_dict(state["model"])
            self.ema.model.load_state_dict(load_file(path / "model.safetensors"))
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            if self.discriminator is not None and "discriminator" in state:
                other = state["discriminator"]
                self.discriminator.load_state_dict(other["model"])
                self.d_optimizer.load_state_dict(other["optimizer"])
                self.d_scheduler.load_state_dict(other["scheduler"])
                self.d_scaler.load_state_dict(other["scaler"])
            self.step, self.position = state["step"], state["position"]
            self.seconds, self.first = state["seconds"], state["first"]
            self._restore_random(state["random"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path} does not fit this run's configuration: {error}"
            ) from error

    # -- what people see --------------------------------------------------------------------------

    def headline(self) -> str:
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return (
            f"{count / 1e6:.2f} M trained parameters, {self.dataset.source.describe()}, "
            f"{len(self.held_out)} held-out crops"
        )

    def _extra_values(self) -> dict[str, float]:
        """Share of the codes in use by their moving average of hits."""
        hits = self.model.quantizer.usage_ema
        return {"usage": (hits > hits.sum() * 1e-3 / len(hits)).double().mean().item()}

    def _summary_facts(self) -> dict[str, int]:
        return {"held_out_crops": len(self.held_out)}

    def summary_text(self, summary: dict[str, Any]) -> str:
        return super().summary_text(summary, f"{len(self.held_out)} held-out crops")
