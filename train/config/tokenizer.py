"""The configuration of a tokenizer's training."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.tokenizer.config import TokenizerConfig

from .checks import check_parallel, check_pixel_losses, check_run, one_of
from .sections import DataConfig, OptimConfig, OutputConfig, PixelLossConfig


@dataclass
class PartRates:
    """Learning rates of the tokenizer's parts as shares of ``optim.lr``; 0 freezes a part."""

    semantic_tower: float = 1.0
    semantic_head: float = 1.0  # from the tower's width to the semantic codebook's
    pixel_encoder: float = 1.0
    codebooks: float = 1.0
    semantic_decoder: float = 1.0
    pixel_decoder: float = 1.0


@dataclass
class TokenizerOptimConfig(OptimConfig):
    """With learning rates by part."""

    lr_scale: PartRates = field(default_factory=PartRates)


@dataclass
class LossConfig(PixelLossConfig):
    """total = semantic * L_sem + vq * (L_vq + L_commit) + L_pix."""

    semantic: float = 1.0
    semantic_kind: str = "cosine"  # or "l2"
    vq: float = 1.0


@dataclass
class CodebookConfig:
    """How codes come to life: k-means on the first batches' features before the first step, and
    codes that are hardly used set anew to a feature of the current batch."""

    kmeans_batches: int = 16  # 0: keep the random start
    kmeans_iterations: int = 10
    restart_every: int = 0  # optimizer steps; 0: never
    restart_until: float = 0.8  # share of the run after which codes are left alone
    restart_threshold: float = 0.05  # a code is dead below this share of the mean hits
    # What dead codes are set to: any of the batch's "rows", or as many of each scale, "by_scale".
    restart_rows: str = "rows"


@dataclass
class TrainConfig:
    """Everything that decides a run."""

    run: str = "runs/tokenizer"
    preset: str = "tiny"
    seed: int = 0
    device: str = "auto"  # "cpu", "cuda" or "auto"
    # Of each process on a CPU, besides one that reads ahead; 0 is torch's choice. Threads that
    # share every small operation wait for each other thousands of times a step: on a machine that
    # does anything else, two are slower than one.
    threads: int = 1
    teacher_weights: str | None = None  # the teacher's file or hub id, where no package ships it
    pretrained_tower: bool = True  # start the semantic encoder from the teacher's weights
    init: str | None = None  # a tokenizer to start from, as in DecoderConfig
    parallel: str = "ddp"  # or "fsdp": weights, gradients and optimizer split over processes
    checkpointing: bool = False  # compute activations of blocks again in the backward pass
    compile: bool = False  # encoders and decoders by torch.compile
    data: DataConfig = field(default_factory=DataConfig)
    optim: TokenizerOptimConfig = field(default_factory=TokenizerOptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    model: TokenizerConfig = field(default_factory=lambda: TokenizerConfig.preset("tiny"))

    def __post_init__(self) -> None:
        check_run(self)
        check_parallel(self)
        one_of("codebook.restart_rows", self.codebook.restart_rows, "rows", "by_scale")
        one_of("loss.semantic_kind", self.loss.semantic_kind, "cosine", "l2")
        check_pixel_losses(self)
        if not self.model.pixel.enabled:
            self._check_semantic_alone()
        self._check_rates()

    def _check_rates(self) -> None:
        """Codebooks that are frozen must not be moved by something else."""
        quantizer, codebook = self.model.quantizer, self.codebook
        if quantizer.kind == "family":
            if codebook.restart_every and quantizer.family.code != "table":
                raise ConfigError(
                    f"codebook.restart_every is {codebook.restart_every} but "
                    f"quantizer.family.code {quantizer.family.code!r} has no codes to set: use 0"
                )
            if codebook.restart_rows != "rows":
                raise ConfigError(
                    "codebook.restart_rows must be 'rows' with quantizer.kind 'family', got "
                    f"{codebook.restart_rows!r}"
                )
        if not self.optim.lr_scale.codebooks:
            if self.model.quantizer.codebook_update == "ema":
                raise ConfigError(
                    "optim.lr_scale.codebooks=0 freezes codebooks that "
                    "model.quantizer.codebook_update=ema moves: use gradient"
                )
            if self.codebook.restart_every:
                raise ConfigError(
                    "optim.lr_scale.codebooks=0 freezes codebooks that codebook.restart_every="
                    f"{self.codebook.restart_every} moves: use 0"
                )

    def _check_semantic_alone(self) -> None:
        """Without a pixel branch no image is decoded: the teacher is all there is to learn from."""
        for name in ("perceptual", "gan"):
            if (value := getattr(self.loss, name)) > 0:
                raise ConfigError(
                    f"loss.{name} is {value} but model.pixel.enabled is false: there are no "
                    "decoded images to compare, set it to 0"
                )
        if self.loss.semantic == 0 or not self.model.teacher.enabled:
            raise ConfigError(
                "model.pixel.enabled is false: training needs a teacher (model.teacher.kind, got "
                f"{self.model.teacher.kind!r}) and loss.semantic above 0 (got {self.loss.semantic})"
            )
