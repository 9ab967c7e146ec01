"""The fine-tuning of a pixel decoder: all else in the tokenizer, its tokens too, stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenflow_ext import QuantizerOutput
from tokenflow_ext.models import ConfigError, TokenFlowTokenizer, TokenizerOutput
from tokenflow_ext.train.config import DecoderConfig
from tokenflow_ext.train.engine import checkpoint, parallel

from .tokenizer import Trainer


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
    made.left_aside = model.left_aside
    return made


class DecoderTrainer(Trainer):
    """The run of a pixel decoder (the "enhanced" one of arXiv 2412.03069, or any other).

    As in the released training ``decoder`` alone learns, and ``post_quant_conv`` before it is
    frozen. Unlike there, the frozen parts are in evaluation mode: no scale is dropped, so that the
    decoder learns from what it will read in use.
    """

    shown = ("total", "l2", "lpips", "generator")

    def _build(self, config: DecoderConfig) -> TokenFlowTokenizer:
        model, _ = checkpoint.load_tokenizer(config.init, config.resolution)
        if not model.config.pixel.enabled:
            raise ConfigError(f"init={config.init} has no pixel decoder: it decodes no images")
        if config.decoder == "enhanced":
            model = with_enhanced_decoder(model)
        model.eval().requires_grad_(False)
        model.decoder.requires_grad_(True)
        return model

    def _build_teacher(self, config: DecoderConfig) -> None:
        return None

    def _split(self, model: TokenFlowTokenizer) -> None:
        """Weights are whole on every process: one decoder's are no burden."""

    def _rates(self) -> list[dict[str, Any]]:
        trained = list(self.model.decoder.parameters())
        return [{"params": trained, "lr": self.config.optim.lr, "name": "pixel_decoder"}]

    def _distribute_model(self) -> nn.Module:
        return parallel.distribute(_PixelBranch(self.model), self.group)

    @torch.no_grad()
    def _next_batch(self) -> tuple[Tensor, QuantizerOutput]:
        """The next micro-batch, and what the frozen encoders make of it."""
        images = next(self._batches).to(self.group.device, non_blocking=True)
        with self._autocast():
            return images, self.model.quantizer(self.model.features(images))

    def _forward(self, images: Tensor, target: QuantizerOutput) -> TokenizerOutput:
        return TokenizerOutput(self.parallel(target.quantized), None, target)

    def _other_losses(self, target: QuantizerOutput) -> dict[str, Any]:
        return {"vq_weight": 0.0}

    def _restart(self) -> None:
        """Codes are frozen."""

    def _extra_values(self) -> dict[str, float]:
        return {}
