"""The configuration of a text-to-image model's training."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.text_to_image.sequence import BackboneConfig
from tokenflow_ext.sampler import SamplingConfig

from .checks import check_captions, check_parallel, check_run, one_of
from .sections import OutputConfig


@dataclass
class CaptionConfig:
    """Pictures with captions: a folder of them, of WebDataset shards, or of ``tokenflow tokenize``.

    ``held_out`` is a second such folder, for the evaluation alone. ``match`` and ``unseen`` are
    regular expressions of whole captions: pairs that ``match`` does not match are left out, those
    that ``unseen`` matches are held out of training.
    """

    path: str = "runs/emoji"
    match: str = ""  # not for shards, nor are the next two
    unseen: str = ""
    limit: int = 0  # this many of the pairs trained with, evenly over the folder (0: all)
    held_out: str | None = None
    evaluated: int = 64  # pairs of each of the two that an evaluation looks at
    drop: float = 0.1  # share of the captions replaced by the empty string
    truncate: float = 0.2  # share of the others that are cut to their first sentence
    # How shards are dealt out (data/captions.py): processes and workers that read shards of their
    # own. It decides the order of the samples, so a run keeps it on any number of processes.
    streams: tuple[int, ...] = (1, 1)
    workers: int = 0  # processes that decode pictures; none: in the training process itself
    cache: int = 256  # MiB of decoded pictures that a process keeps, the first that fit
    # Keys of a caption in metadata.jsonl and NAME.json; the first that holds a text counts.
    caption_keys: tuple[str, ...] = ("caption", "text")


@dataclass
class TextOptimConfig:
    """As :class:`OptimConfig`; ``ema_decay = 0`` keeps no moving average of the weights."""

    steps: int = 1500
    batch: int = 16
    accumulate: int = 1
    lr: float = 1.0e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: str = "cosine"  # or "linear", "constant"
    warmup: int = 50
    warmup_lr: float = 0.0  # of lr, where the warm-up starts
    flat: float = 0.05  # "linear": share of the steps after the warm-up that keep lr
    final_lr: float = 0.02
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    precision: str = "fp32"  # or "bf16", "fp16"


@dataclass
class TextModelConfig:
    """The transformer. ``backbone`` is its shape where it does not start from pretrained weights,
    and ``vocabulary`` the size of the byte-level text tokenizer that is then made of the captions.
    """

    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=1024,
        )
    )
    vocabulary: int = 512
    prompt_length: int = 24  # ids that a caption is cut or padded to
    attention: str = "sdpa"  # or "flex"
    checkpointing: bool = False  # compute activations again in the backward pass


@dataclass
class TextConfig:
    """Everything that decides a run of ``train/text_to_image.py``."""

    run: str = "runs/text-to-image"
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    # The image tokenizer: a run, a checkpoint, a save_pretrained folder, or an original checkpoint.
    tokenizer: str = "runs/emoji-tokenizer"
    resolution: int | None = None  # of an original B: 224 or 256
    backbone: str | None = None  # pretrained: a folder of transformers, or a GGUF file
    init: str | None = None  # a run, checkpoint or save_pretrained folder to start from
    parallel: str = "ddp"  # or "fsdp": weights, gradients and optimizer split over processes
    data: CaptionConfig = field(default_factory=CaptionConfig)
    optim: TextOptimConfig = field(default_factory=TextOptimConfig)
    model: TextModelConfig = field(default_factory=TextModelConfig)
    sample: SamplingConfig = field(default_factory=SamplingConfig)  # of the run's pictures
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check_run(self)
        check_parallel(self)
        one_of("model.attention", self.model.attention, "sdpa", "flex")
        if self.backbone is not None and self.init is not None:
            raise ConfigError("backbone and init are two starts: give one")
        check_captions(self.data, "data")
