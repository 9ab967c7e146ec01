"""The training of a tokenizer: a step, the evaluation, and everything a checkpoint holds."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.discriminators import PatchDiscriminator
from tokenflow_ext.models.losses import LPIPS, hinge_d_loss, tokenizer_loss
from tokenflow_ext.models.metrics import cosine, psnr
from tokenflow_ext.models.teachers import build_teacher
from tokenflow_ext.train import checkpoint, data
from tokenflow_ext.train.config import OptimConfig, TrainConfig, to_yaml
from tokenflow_ext.train.distributed import Processes
from tokenflow_ext.train.logs import RunLog, table

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(step: int, config: OptimConfig) -> float:
    """The factor of the learning rate at an optimizer step: linear warm-up, then the schedule."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


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


class Trainer:
    """A run: models, optimizers, data position. Made on every process alike."""

    def __init__(self, config: TrainConfig, group: Processes) -> None:
        self.config, self.group = config, group
        if group.device.type == "cpu" and config.threads:
            torch.set_num_threads(config.threads)
        self.run = Path(config.run)
        self.step = 0
        self.seconds = 0.0
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        size = config.model.image_size

        train, held_out = data.split(config.data)
        self.dataset = data.RandomCrops(train, size, config.data, config.seed)
        self.shard = data.Shard(
            config.optim.batch, config.optim.accumulate, group.rank, group.world
        )
        self.position = 0
        self.held_out = data.held_out_crops(held_out, size, config.data.held_out_crops)
        self._batches: Iterator[Tensor] = iter(())
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

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
        self.dtype = PRECISIONS[optim.precision]
        half = optim.precision == "fp16"
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=half)
        self.d_scaler = torch.amp.GradScaler(group.device.type, enabled=half)
        self._seed(1 + group.rank)  # from here on every process draws its own numbers

    def _seed(self, stream: int) -> None:
        seed = np.random.SeedSequence([self.config.seed, stream]).generate_state(2)
        torch.manual_seed(int(seed[0]))
        np.random.seed(int(seed[1]))  # noqa: NPY002 - for code that draws from it
        random.seed(int(seed[1]))

    def _optimizer(self, model: nn.Module, lr: float, start: int = 0) -> tuple[Any, Any]:
        """Adam, and the schedule of a model that trains from optimizer step ``start`` on."""
        optim = self.config.optim
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad],
            lr=lr,
            betas=tuple(optim.betas),
            weight_decay=optim.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(start + step, optim)
        )
        return optimizer, scheduler

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

    def _autocast(self) -> Any:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.group.device.type, self.dtype)

    def prepare(self) -> None:
        """Set the codebooks by k-means if the run is new, wrap the models, start reading."""
        if self.step == 0 and self.config.init is None and self.config.codebook.kmeans_batches:
            self._start_codebooks()
        self.parallel = self._distribute(self.model)
        if self.discriminator is not None:
            self.d_parallel = self._distribute(self.discriminator)
        self._batches = self._read(self.position, self.config.data.workers)
        if self.group.device.type == "cpu":
            self._pool = ThreadPoolExecutor(1)
            self._pending = self._pool.submit(self._next_batch)

    def _read(self, position: int, workers: int = 0) -> Iterator[Tensor]:
        return iter(data.loader(self.dataset, self.shard, position, workers))

    def _next_batch(self) -> tuple[Tensor, Tensor | None]:
        """The next micro-batch, and the teacher's tokens of it."""
        images = next(self._batches).to(self.group.device, non_blocking=True)
        if self.teacher is None:
            return images, None
        with self._autocast():
            return images, self.teacher(images)

    def _take_batch(self) -> tuple[Tensor, Tensor | None]:
        """The next micro-batch; on a CPU a thread has made it ready and starts on the one after.

        Neither images nor teacher depend on what is learned or drawn, so nothing else changes.
        """
        if self._pool is None:
            return self._next_batch()
        ready = self._pending.result()
        self._pending = self._pool.submit(self._next_batch)
        return ready

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

    def _update(self, model: nn.Module, optimizer: Any, scaler: Any) -> Tensor:
        scaler.unscale_(optimizer)
        limit = self.config.optim.max_grad_norm
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit if limit > 0 else math.inf)
        scaler.step(optimizer)
        scaler.update()
        return norm

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
        share = hits.double() / hits.sum()
        entropy = -(share * share.clamp_min(1e-300).log()).sum()
        values = {"psnr": (sums[0] / sums[2]).item()}
        if self.teacher is not None:
            values["cosine"] = (sums[1] / sums[2]).item()
        values["usage"] = (hits > 0).double().mean().item()
        values["perplexity"] = entropy.exp().item()
        return values

    @torch.no_grad()
    def pictures(self) -> tuple[Tensor, Tensor]:
        """Held-out crops spread over the set, and what the EMA weights make of them."""
        count = min(self.config.output.pictures, len(self.held_out))
        which = torch.linspace(0, len(self.held_out) - 1, count).round().long()
        images = self.held_out[which].to(self.group.device)
        return images, self.ema.model.decode(self.ema.model.encode(images))[0]

    # -- checkpoints ------------------------------------------------------------------------------

    def _random_states(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        states = {
            "torch": torch.get_rng_state(),
            "numpy": [kind, keys.tolist(), *rest],
            "python": random.getstate(),
        }
        if self.group.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.group.device)
        return states

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
            states = state["random"]
        except (RuntimeError, KeyError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path} does not fit this run's configuration: {error}"
            ) from error
        if len(states) == self.group.world:
            mine = states[self.group.rank]
            torch.set_rng_state(mine["torch"])
            kind, keys, *rest = mine["numpy"]
            np.random.set_state(  # noqa: NPY002
                (kind, np.array(keys, dtype=np.uint32), *rest)
            )
            version, numbers, gauss = mine["python"]
            random.setstate((version, tuple(numbers), gauss))
            if self.group.device.type == "cuda" and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"], self.group.device)

    # -- the run ----------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last step; returns the summary."""
        output, steps = self.config.output, self.config.optim.steps
        log = None
        if self.group.first:
            self.run.mkdir(parents=True, exist_ok=True)
            log = RunLog(
                self.run,
                self.step,
                steps,
                tensorboard=output.tensorboard,
                progress=output.progress,
            )
        self.prepare()
        started, done_before = time.perf_counter(), self.step
        before = self.seconds
        if self.step == 0:
            self._report(log)
        while self.step < steps:
            values = self.train_step()
            self.seconds = before + time.perf_counter() - started
            last = self.step == steps
            if log is not None:
                log.advance()
            if last or self.step % output.log_every == 0:
                speed = (self.step - done_before) / (self.seconds - before)
                self._log_step(log, values, speed)
            if last or self.step % output.eval_every == 0:
                self._report(log)
            if log is not None and (last or self.step % output.picture_every == 0):
                name = "final" if last else f"step_{self.step:08d}"
                log.picture(self.step, self.run / "pictures" / f"{name}.png", *self.pictures())
            self.seconds = before + time.perf_counter() - started
            if last or self.step % output.checkpoint_every == 0:
                self.save()
        if not self.last:  # the run was already complete
            self.last = self.evaluate()
        if log is not None:
            log.close()
        if self._pool is not None:
            self._pool.shutdown()
        self.group.wait()
        return self._summary()

    def _log_step(self, log: RunLog | None, values: dict[str, Tensor], speed: float) -> None:
        names = sorted(values)
        mean = self.group.mean_(torch.stack([values[n].float() for n in names]))
        numbers = dict(zip(names, mean.tolist(), strict=True))
        bad = [n for n in names if not math.isfinite(numbers[n])]
        if bad and not (bad == ["grad_norm"] and self.scaler.is_enabled()):
            raise FloatingPointError(
                f"step {self.step}: {', '.join(bad)} is not finite; the last checkpoint is intact. "
                "Lower optim.lr or optim.max_grad_norm, or use optim.precision=fp32"
            )
        numbers["usage"] = self._usage()
        numbers["lr"] = self.optimizer.param_groups[0]["lr"]
        if log is None:
            return
        shown = {n: numbers[n] for n in ("total", "l2", "semantic", "vq")}
        images = speed * self.config.optim.batch
        log.show(shown | {"usage": numbers["usage"], "img/s": images})
        log.values(self.step, numbers | {"images_per_second": images}, "train")

    def _usage(self) -> float:
        """Share of the codes in use by their moving average of hits, alike on every process."""
        hits = self.model.quantizer.usage_ema
        return (hits > hits.sum() * 1e-3 / len(hits)).double().mean().item()

    def _report(self, log: RunLog | None) -> None:
        self.last = self.evaluate()
        if self.step == 0:
            self.first = dict(self.last)
        if log is not None:
            log.values(self.step, self.last, "held_out")
            text = ", ".join(f"{k} {v:.4g}" for k, v in self.last.items())
            log.say(f"step {self.step}, held out: {text}")

    def _summary(self) -> dict[str, Any]:
        summary = {
            "steps": self.step,
            "images": self.position,
            "seconds": round(self.seconds, 1),
            "held_out_crops": len(self.held_out),
            "first": self.first,
            "last": self.last,
        }
        if self.group.first:
            checkpoint.write_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def summary_text(summary: dict[str, Any], run: Path) -> str:
    """The end of a run for people: what was reached on held-out crops, the time, the paths."""
    names = {
        "psnr": ("PSNR", "{:.2f} dB"),
        "cosine": ("cosine to the teacher", "{:.3f}"),
        "usage": ("codes in use", "{:.1%}"),
        "perplexity": ("perplexity of the codes", "{:.0f}"),
    }
    rows = [(f"{summary['held_out_crops']} held-out crops", "first", "last")]
    for key, (name, form) in names.items():
        if key in summary["last"]:
            first, last = (summary[when].get(key) for when in ("first", "last"))
            rows.append((name, "-" if first is None else form.format(first), form.format(last)))
    newest = checkpoint.available(run / "checkpoints")
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    paths = [
        ("picture", run / "pictures" / "final.png"),
        ("checkpoint", newest[-1] if newest else "-"),
        ("logs", f"{run / 'log.jsonl'}, tensorboard --logdir {run}"),
    ]
    return "\n".join(
        [
            "",
            table(rows),
            "",
            f"{summary['steps']} steps, {summary['images']} crops in {minutes} min {seconds} s",
            *(f"{name:10s} {path}" for name, path in paths),
        ]
    )
