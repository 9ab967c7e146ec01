"""The configuration of a pixel decoder's fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenflow_ext.models.serialization.config import ConfigError

from .checks import check_pixel_losses, check_run, one_of
from .sections import DataConfig, OptimConfig, OutputConfig, PixelLossConfig


@dataclass
class DecoderConfig:
    """Everything that decides a run of ``train/decoder.py``."""

    run: str = "runs/decoder"
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    checkpointing: bool = False  # as in TrainConfig, and compile
    compile: bool = False
    # The tokenizer: a run, a checkpoint, a save_pretrained folder, or an original checkpoint.
    init: str = "runs/tokenizer"
    resolution: int | None = None  # of an original B: 224 or 256
    # "kept": its pixel decoder goes on from where it is. "enhanced": one of twice the width and
    # twice the residual blocks starts anew, unless it has those already.
    decoder: str = "kept"
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=300, lr=1.0e-3))
    loss: PixelLossConfig = field(default_factory=PixelLossConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check_run(self)
        one_of("decoder", self.decoder, "kept", "enhanced")
        check_pixel_losses(self)
        if not self.loss.pixel + self.loss.perceptual > 0:
            raise ConfigError("loss.pixel and loss.perceptual are both 0: give one a weight")
