"""Configuration of an understanding model's training."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.text_to_image.sequence import BackboneConfig
from tokenflow_ext.models.understanding.chat import FORMS
from tokenflow_ext.models.understanding.names import DTYPES, FEATURES, WINDOWS

from .checks import check_parallel, check_run, one_of
from .sections import OutputConfig
from .text_to_image import TextOptimConfig

PARTS = ("projector", "language_model")
MASKS = ("answers", "original")


@dataclass
class ConversationConfig:
    """Conversations about pictures: LLaVA's JSON or JSONL, or a folder of WebDataset shards.

    ``images`` is the folder that the file's names of pictures are below (None: the file's own).
    ``held_out`` and ``held_out_images`` are a second such source, for the evaluation alone.
    ``tokens`` and ``held_out_tokens`` are folders of ``tokenflow tokenize`` on those pictures: the
    tokens are then read in their place.
    """

    path: str = "runs/easy-vqa/train.json"
    images: str | None = None
    tokens: str | None = None
    held_out: str | None = None
    held_out_images: str | None = None
    held_out_tokens: str | None = None
    evaluated: int = 512  # conversations that an evaluation looks at
    template: str = "vicuna"  # or "chatml", "plain"
    system: str | None = None  # what stands before a conversation; None is the template's own
    mask: str = "answers"  # or "original": what the released program learns of ChatML
    length: int = 2048  # ids of a conversation at most, the pictures' included
    pad: bool = True  # pictures to squares, in the middle of grey
    group_by_length: bool = True
    streams: tuple[int, ...] = (1, 1)  # see CaptionConfig; of shards alone
    workers: int = 0  # processes that decode pictures; none: in the training process itself
    cache: int = 256  # MiB of pixels that a process keeps, the first that fit


@dataclass
class LoraConfig:
    """Low-rank adapters in the language model's linear layers (peft), in the place of training all
    of it; ``rank = 0`` has none."""

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0


@dataclass
class UnderstandingModelConfig:
    """The model. ``backbone`` is the language model's shape where it starts from random weights,
    and ``vocabulary`` the size of the byte-level text tokenizer that is then made of the data."""

    features: str = "last"  # or "full", "residual", "semantic", "continuous"
    window: int = 1  # side of the neighbourhood that a position's row holds; the paper's is 1
    tokenizer_dtype: str = "float32"
    trained: tuple[str, ...] = PARTS  # stage 1 of the paper trains the projector alone
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
    checkpointing: bool = False  # compute activations again in the backward pass
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class UnderstandingConfig:
    """Everything that decides a run of ``train/understanding.py``."""

    run: str = "runs/understanding"
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    # The image tokenizer: a run, a checkpoint, a save_pretrained folder, or an original checkpoint.
    tokenizer: str = "runs/easy-vqa-tokenizer"
    resolution: int | None = None  # of an original B: 224 or 256
    language_model: str | None = None  # pretrained: a folder of transformers, or a GGUF file
    init: str | None = None  # a run, checkpoint or saved model to start from, such as stage 1's
    parallel: str = "ddp"  # or "fsdp": weights, gradients and optimizer split over processes
    data: ConversationConfig = field(default_factory=ConversationConfig)
    optim: TextOptimConfig = field(default_factory=TextOptimConfig)
    model: UnderstandingModelConfig = field(default_factory=UnderstandingModelConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check_run(self)
        check_parallel(self)
        one_of("data.template", self.data.template, *FORMS)
        one_of("data.mask", self.data.mask, *MASKS)
        one_of("model.features", self.model.features, *FEATURES)
        one_of("model.tokenizer_dtype", self.model.tokenizer_dtype, *DTYPES)
        for part in self.model.trained:
            one_of("model.trained", part, *PARTS)
        if not self.model.trained:
            raise ConfigError("model.trained must name a part, got none")
        if self.model.window not in WINDOWS:
            raise ConfigError(f"model.window must be one of {WINDOWS}, got {self.model.window}")
        if self.language_model is not None and self.init is not None:
            raise ConfigError("language_model and init are two starts: give one")
        if (self.data.tokens or self.data.held_out_tokens) and self.model.features == "continuous":
            raise ConfigError("features 'continuous' are of pictures: data.tokens do not hold them")
        if self.model.lora.rank and "language_model" not in self.model.trained:
            raise ConfigError("model.lora is for a language model that is trained")
        if self.model.lora.rank and self.parallel == "fsdp":
            raise ConfigError("model.lora is not for parallel=fsdp: use ddp")
