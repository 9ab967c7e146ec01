"""The configuration of a VAR transformer's training."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.var.config import VarConfig
from tokenflow_ext.sampler import SamplingConfig

from .checks import check_parallel, check_run, one_of
from .sections import OutputConfig
from .text_to_image import TextOptimConfig


@dataclass
class LabelConfig:
    """Pictures with a class each: a folder of them, of WebDataset shards, or of ``tokenflow
    tokenize``.

    A picture's class is what the first of ``label_keys`` says of it, in ``metadata.jsonl`` (shards:
    in NAME.json; tokens: in the row of the picture), or NAME.cls in shards, or else the folder that
    it lies in, below ``path``. Labels that are whole numbers are the classes' numbers, from 0.
    """

    path: str = ""  # has to be given
    held_out: str | None = None  # a second such folder, for the evaluation alone
    # A file with the classes' names, one a line, in order. Without it they are sorted by name;
    # shards with names, which nobody has read before, need it.
    classes: str | None = None
    label_keys: tuple[str, ...] = ("label", "class")
    evaluated: int = 64  # pictures of each of the two that an evaluation looks at
    # Pictures, not tokens: resized to ``resize`` times the tokenizer's side (the shorter one), of
    # which a random square is cut. 1 is the middle square, as `tokenflow tokenize` takes it.
    resize: float = 1.0
    flip: bool = False
    streams: tuple[int, ...] = (1, 1)  # see CaptionConfig
    workers: int = 0
    cache: int = 256  # MiB of decoded pictures that a process keeps, the first that fit


@dataclass
class VarOptimConfig(TextOptimConfig):
    """As :class:`TextOptimConfig`. ``schedule = "linear"`` is VAR's: after the warm-up flat for the
    share ``flat`` of the steps, then a line down to ``final_lr``. Weight decay is for the matrices
    of linear layers alone."""

    schedule: str = "linear"
    max_grad_norm: float = 2.0


@dataclass
class VarModelConfig:
    """The transformer: see :class:`VarConfig`, whose width and heads follow from the depth where
    they are 0. Its codes and scales are the tokenizer's, its classes the data's."""

    depth: int = 16
    width: int = 0
    heads: int = 0
    mlp_ratio: float = 4.0
    classes: int = 0  # how many; 0: as many as are found, or named in data.classes
    shared_adaln: bool = False
    l2_attention: bool = True
    class_drop: float = 0.1
    drop_path: float = -1.0
    attention: str = "scales"  # or "flex"
    checkpointing: bool = False  # compute activations again in the backward pass


def _sampling() -> SamplingConfig:
    return SamplingConfig(top_k=(900,), top_p=(0.96,), guidance=1.5)


@dataclass
class VarTrainConfig:
    """Everything that decides a run of ``train/var.py``."""

    run: str = "runs/var"
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    # The image tokenizer: a run, a checkpoint, a save_pretrained folder, or an original checkpoint.
    # A saved model in init has its own.
    tokenizer: str = ""
    resolution: int | None = None  # of an original B: 224 or 256
    # A run, checkpoint or save_pretrained folder to start from, or a released file. With other
    # classes than the data's, its table of classes is made anew.
    init: str | None = None
    parallel: str = "ddp"  # or "fsdp": weights, gradients and optimizer split over processes
    data: LabelConfig = field(default_factory=LabelConfig)
    optim: VarOptimConfig = field(default_factory=VarOptimConfig)
    model: VarModelConfig = field(default_factory=VarModelConfig)
    sample: SamplingConfig = field(default_factory=_sampling)  # of the run's pictures
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check_run(self)
        check_parallel(self)
        one_of("model.attention", self.model.attention, "scales", "flex")
        model = self.model
        VarConfig(  # what is wrong with the shape is said before anything is read
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            mlp_ratio=model.mlp_ratio,
            class_drop=model.class_drop,
            drop_path=model.drop_path,
        )
        if len(self.sample.top_k) != 1:
            raise ConfigError(
                f"sample.top_k must be one number: VAR draws once, got {self.sample.top_k}"
            )
        if not self.data.label_keys or not all(self.data.label_keys):
            raise ConfigError(f"data.label_keys must name keys, got {list(self.data.label_keys)}")
