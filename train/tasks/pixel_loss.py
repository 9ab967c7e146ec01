"""The losses of decoded images: L2, LPIPS, and a discriminator that trains along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.losses.discriminators import StyleGanDiscriminator, build_discriminator
from tokenflow_ext.models.losses.tokenizer import LPIPS, discriminator_loss
from tokenflow_ext.train.config import OptimConfig, PixelLossConfig
from tokenflow_ext.train.data import BatchPartition
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.optimization import OptimizedModel, autocast


class PixelLoss:
    """What judges decoded images (arXiv 2412.03069, section 3.2; see :class:`PixelLossConfig`).

    Args:
        size: side of the images in pixels.
        partition: this process's part of each batch.

    Attributes:
        discriminator: with its optimizer; None without an adversarial loss.
    """

    def __init__(
        self,
        config: PixelLossConfig,
        optim: OptimConfig,
        size: int,
        partition: BatchPartition,
        group: Processes,
    ) -> None:
        self.config, self._precision, self._device = config, optim.precision, group.device
        self.perceptual = None
        if config.perceptual > 0:
            self.perceptual = LPIPS(config.perceptual_weights).to(group.device)
        self.discriminator: OptimizedModel | None = None
        if config.gan > 0:
            network = _build(config, size, partition.local).to(group.device)
            self.discriminator = OptimizedModel(
                network,
                network.parameters(),
                optim.discriminator_lr,
                optim,
                group,
                start=config.gan_start,
            )

    def optimized(self) -> dict[str, OptimizedModel]:
        """The models that train along, by name."""
        return {} if self.discriminator is None else {"discriminator": self.discriminator}

    def generator_terms(
        self, images: Tensor | None, last_layer: Tensor | None, step: int
    ) -> dict[str, Any]:
        """Arguments of :func:`tokenizer_loss` for these decoded images [B, 3, H, W].

        Args:
            last_layer: weight of the decoder's last convolution.
            step: optimizer steps done.
        """
        config, logits = self.config, None
        if self.discriminator is not None and step >= self.discriminator.start:
            network = self.discriminator.module
            network.requires_grad_(False)
            logits = network(images)
            network.requires_grad_(True)
        return {
            "perceptual": self.perceptual,
            "fake_logits": logits,
            "l2_weight": config.pixel,
            "perceptual_weight": config.perceptual,
            "generator_weight": config.gan,
            "generator_kind": config.generator_loss,
            "adaptive_layer": last_layer if config.gan_adaptive else None,
        }

    def train_discriminator(self, real: Tensor, made: Tensor, step: int) -> dict[str, Tensor]:
        """Forward and backward of the discriminator, where it trains at ``step``; its loss.

        Args:
            real, made: [B, 3, H, W]; ``made`` without a graph.
        """
        model = self.discriminator
        if model is None or step < model.start:
            return {}
        with record_function("discriminator"):
            with autocast(self._precision, self._device):
                of_real, of_made = model.parallel(torch.cat([real, made])).chunk(2)
                loss = discriminator_loss(of_real, of_made, self.config.discriminator_loss)
            model.backward(loss)
        return {"discriminator": loss}


def _build(config: PixelLossConfig, size: int, local: int) -> nn.Module:
    model = build_discriminator(config.discriminator, size, config.discriminator_channels)
    if isinstance(model, StyleGanDiscriminator) and local % model.group:
        raise ConfigError(
            f"loss.discriminator=stylegan compares images in groups of {model.group}: "
            "optim.batch must give each process and accumulation step a multiple of that, got "
            f"{local}"
        )
    return model
