"""The fine-tuning of a pixel decoder: all else in the tokenizer, its tokens too, stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tokenflow_ext import QuantizerOutput
from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import ConfigError, TokenFlowTokenizer, TokenizerOutput
from tokenflow_ext.models.losses.tokenizer import tokenizer_loss
from tokenflow_ext.train.config import DecoderConfig
from tokenflow_ext.train.data import BatchPartition
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.ema import EMA
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.optimization import OptimizedModel, autocast
from tokenflow_ext.train.engine.random_state import seed_generators, undrawn
from tokenflow_ext.train.engine.task import Task

from .crops import METRICS, CropData
from .pixel_loss import PixelLoss
from .tokenizer import check_same_model, eager, headline


class _PixelBranch(nn.Module):
    """A tokenizer whose forward pass is its pixel branch's."""

    def __init__(self, model: TokenFlowTokenizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, f_hat: Tensor) -> Tensor:
        """Quantized features [B, C, h, w] -> images [B, 3, H, W]."""
        return self.model.decode_pixels(f_hat)


def with_enhanced_decoder(model: TokenFlowTokenizer) -> TokenFlowTokenizer:
    """The same tokenizer with a pixel decoder of twice the width and residual blocks, its weights
    random; ``model`` itself where it has such a decoder."""
    config = model.config.with_enhanced_decoder()
    if config == model.config:
        return model
    made = TokenFlowTokenizer(config)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")}
    made.load_state_dict(made.state_dict() | kept)
    made.unused_tensors = model.unused_tensors
    return made


class DecoderTask(Task):
    """A pixel decoder that learns to decode tokens (the "enhanced" one of arXiv 2412.03069, or any
    other).

    As in the original training ``decoder`` alone learns, and ``post_quant_conv`` before it is
    frozen. Unlike there, the frozen parts are in evaluation mode: no scale is dropped, so that the
    decoder learns from what it will read in use.
    """

    progress = ("total", "l2", "lpips", "generator")
    evaluation = ("held_out", "held out")
    metrics = METRICS

    def __init__(self, config: DecoderConfig, group: Processes, resuming: bool = False) -> None:
        self.config, self.group = config, group
        optim = config.optim
        partition = BatchPartition(optim.batch, optim.accumulate, group.rank, group.world)
        seed_generators(config.seed, 0)
        self.model: TokenFlowTokenizer = self._build(resuming).to(group.device)
        if config.checkpointing:
            self.model.checkpoint_activations()
        if config.compile:
            self.model.compile_networks()
        size = self.model.config.image_size
        self.crops = CropData(config.data, size, config.seed, partition)
        self.dataset = self.crops.dataset
        self.pixel_loss = PixelLoss(config.loss, optim, size, partition, group)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Codebooks do not move; checkpoints have always had an average of them all the same.
        moved = {*trained, *self.model.quantizer.codebooks}
        self.ema = EMA(
            {n: p for n, p in self.model.named_parameters() if p in moved}, optim.ema_decay
        )
        # Weights are whole on every process: one decoder's are no burden.
        self.generator = OptimizedModel(
            self.model,
            [{"params": trained, "lr": optim.lr, "name": "pixel_decoder"}],
            optim.lr,
            optim,
            group,
            called=_PixelBranch(self.model),
        )
        self.optimized = {"model": self.generator, **self.pixel_loss.optimized()}

    def _build(self, resuming: bool) -> TokenFlowTokenizer:
        """The tokenizer as training starts with it, its decoder ready to train."""
        config = self.config
        model, _ = checkpoint.load_tokenizer(config.init, config.resolution)
        if not model.config.pixel.enabled:
            raise ConfigError(f"init={config.init} has no pixel decoder: it decodes no images")
        if config.decoder == "enhanced":
            with undrawn(resuming):
                model = with_enhanced_decoder(model)
        model.eval().requires_grad_(False)
        model.decoder.requires_grad_(True)
        return model

    # -- a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def batches(self, position: int) -> Iterator[tuple[Tensor, QuantizerOutput]]:
        """Images [B, 3, S, S], and what the frozen encoders and the quantizer make of them."""
        device = self.group.device
        for crops in self.crops.batches(position, self.config.data.workers):
            images = crops.to(device, non_blocking=True)
            with autocast(self.config.optim.precision, device):
                quantized = self.model.quantizer(self.model.features(images))
            yield images, quantized

    def decode(self, quantized: QuantizerOutput) -> TokenizerOutput:
        """The pixel branch's output, as a training step computes it."""
        images = self.generator.parallel(quantized.quantized)
        return TokenizerOutput(images, None, quantized)

    def micro_step(self, batch: tuple[Tensor, QuantizerOutput], step: int) -> dict[str, Tensor]:
        images, quantized = batch
        with autocast(self.config.optim.precision, self.group.device):
            out = self.decode(quantized)
            terms = self.pixel_loss.generator_terms(out.images, self.model.last_layer, step)
            losses = tokenizer_loss(out, images, vq_weight=0.0, **terms)
        with record_function("backward"):
            self.generator.backward(losses.total)
        assert out.images is not None
        return losses._asdict() | self.pixel_loss.train_discriminator(
            images, out.images.detach(), step
        )

    # -- what people see --------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """See :meth:`CropData.evaluate`."""
        with eager(self.config):
            return self.crops.evaluate(self.model, self.group)

    def pictures(self) -> tuple[Tensor, Tensor]:
        """Held-out crops and their reconstructions."""
        images = self.crops.some_held_out(self.config.output.pictures).to(self.group.device)
        with eager(self.config):
            return images, self.model(images).images

    def headline(self) -> str:
        return headline(self.model, self.generator, self.crops)

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


def decoder_trainer(config: DecoderConfig, group: Processes) -> Trainer:
    """The run of a pixel decoder, as the class ``DecoderTrainer`` of before gave it."""
    return Trainer(config, group, DecoderTask)


__getattr__ = renamed(__name__, {"DecoderTrainer": "decoder_trainer"})
