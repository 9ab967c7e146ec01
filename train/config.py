"""Configuration of a training run: dataclasses, YAML files and dotted command-line overrides.

A configuration is made in this order, later wins: the defaults below, the preset of the model, the
YAML file, the command line (``optim.lr=3e-4`` or ``--optim.lr 3e-4``). An unknown key and a value
of the wrong type are errors that name the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokenflow_ext.models.config import ConfigError, TokenizerConfig, from_plain, to_plain


@dataclass
class DataConfig:
    """What is trained on.

    ``path`` is a folder of images (searched in all its folders); without it the photographs that
    ship inside scikit-image and scikit-learn are used. ``held_out`` is a second folder for the
    evaluation; without it, part of the data is set aside and never trained on.
    """

    path: str | None = None
    held_out: str | None = None
    held_out_crops: int = 96
    min_crop: float = 0.25  # side of the smallest random crop, as a share of the shorter side
    max_crop: float = 0.6
    aspect: float = 1.15  # width / height of a random crop lies within [1 / aspect, aspect]
    flip: bool = True
    workers: int = 0  # processes that decode images; none: in the training process itself


@dataclass
class CaptionConfig:
    """Pictures with captions: a folder of them, of WebDataset shards, or of ``tokenflow tokenize``.

    ``held_out`` is a second such folder, for the evaluation alone.
    """

    path: str = "runs/emoji"
    limit: int = 0  # this many pairs, evenly over the folder (0: all); not for shards
    held_out: str | None = None
    evaluated: int = 64  # pairs of each of the two that an evaluation looks at
    drop: float = 0.1  # share of the captions replaced by the empty string
    truncate: float = 0.2  # share of the others that are cut to their first sentence
    # How shards are dealt out (train/captions.py): processes and workers that read shards of their
    # own. It decides the order of the samples, so a run keeps it on any number of processes.
    streams: tuple[int, ...] = (1, 1)
    workers: int = 0  # processes that decode pictures; none: in the training process itself


@dataclass
class OptimConfig:
    """Adam and its schedule. ``batch`` is the number of images of one optimizer step over all
    processes and accumulation steps together, so a run means the same on any machine."""

    steps: int = 1300
    batch: int = 16
    accumulate: int = 1
    lr: float = 2.0e-3
    discriminator_lr: float = 2.0e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: str = "cosine"  # or "constant"
    warmup: int = 50
    final_lr: float = 0.02  # of lr, where the cosine ends
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    precision: str = "fp32"  # or "bf16", "fp16"


@dataclass
class LossConfig:
    """Weights of the losses; 0 switches one off (arXiv 2412.03069, section 3.2).

    total = semantic * L_sem + vq * (L_vq + L_commit) + pixel * L2 + perceptual * LPIPS
    + gan * adaptive weight * L_G from step ``gan_start`` on.
    """

    semantic: float = 1.0
    semantic_kind: str = "cosine"  # or "l2"
    pixel: float = 1.0
    vq: float = 1.0
    perceptual: float = 0.0
    perceptual_weights: str | None = None  # torchvision's VGG16 file
    gan: float = 0.0
    gan_start: int = 20000
    gan_adaptive: bool = True


@dataclass
class CodebookConfig:
    """How codes come to life: k-means on the first batches' features before the first step, and
    codes that are hardly used set anew to a feature of the current batch."""

    kmeans_batches: int = 16  # 0: keep the random start
    kmeans_iterations: int = 10
    restart_every: int = 0  # optimizer steps; 0: never
    restart_until: float = 0.8  # share of the run after which codes are left alone
    restart_threshold: float = 0.05  # a code is dead below this share of the mean hits


@dataclass
class OutputConfig:
    """How often what is written, in optimizer steps. The last step always writes everything."""

    log_every: int = 10
    eval_every: int = 325
    picture_every: int = 325
    checkpoint_every: int = 325
    keep: int = 2  # checkpoints
    pictures: int = 24  # held-out crops shown in a picture
    tensorboard: bool = True
    progress: bool = True


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
    teacher_weights: str | None = None  # the teacher's file where no package ships it
    pretrained_tower: bool = True  # start the semantic encoder from the teacher's weights
    init: str | None = None  # a save_pretrained folder to start from
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    model: TokenizerConfig = field(default_factory=lambda: TokenizerConfig.preset("tiny"))

    def __post_init__(self) -> None:
        _one_of("optim.schedule", self.optim.schedule, "cosine", "constant")
        _one_of("optim.precision", self.optim.precision, "fp32", "bf16", "fp16")
        _one_of("loss.semantic_kind", self.loss.semantic_kind, "cosine", "l2")
        if len(self.optim.betas) != 2:
            raise ConfigError(f"optim.betas must be two numbers, got {self.optim.betas}")
        least = {
            "": (self, 0, ("seed", "threads")),
            "optim": (self.optim, 1, ("steps", "batch", "accumulate")),
            "output": (
                self.output,
                1,
                ("log_every", "eval_every", "picture_every", "checkpoint_every", "keep"),
            ),
            "loss": (self.loss, 0, ("semantic", "pixel", "vq", "perceptual", "gan", "gan_start")),
            "data": (self.data, 1, ("held_out_crops",)),
        }
        for section, (values, minimum, names) in least.items():
            for name in names:
                if (value := getattr(values, name)) < minimum:
                    key = f"{section}.{name}".lstrip(".")
                    raise ConfigError(f"{key} must be {minimum} or more, got {value}")


def _one_of(key: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


class _Loader(yaml.SafeLoader):
    """YAML whose floats are those of YAML 1.2: ``1e-4`` is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {error}") from error


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["optim.lr=1e-4", "--seed", "3", "--data.flip=no"]`` as a nested mapping.

    Raises:
        ConfigError: an argument that is neither ``key=value`` nor ``--key value``.
    """
    nested: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not rest:
                raise ConfigError(f"expected key=value or --key value, got {word!r}")
            text = rest.pop(0)
        *sections, name = key.split(".")
        value: Any = {name: _read_yaml(text, key)}
        for section in reversed(sections):
            value = {section: value}
        nested = _overlay(nested, value)
    return nested


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            value = _overlay(result[key], value)
        result[key] = value
    return result


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of a run from an optional YAML file and command-line overrides.

    Raises:
        ConfigError: unknown keys, wrong types, or a file that is not a YAML mapping.
    """
    given: Any = {}
    if path is not None:
        try:
            given = _read_yaml(Path(path).read_text(encoding="utf-8"), str(path)) or {}
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        if not isinstance(given, dict):
            raise ConfigError(f"{path} must hold a mapping, got {type(given).__name__}")
    given = _overlay(given, parse_overrides(overrides or []))
    model = TokenizerConfig.preset(given.get("preset", "tiny"))
    return from_plain(TrainConfig, _overlay(to_plain(TrainConfig(model=model)), given))


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that ``load_config`` reads back to an equal configuration."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None, width=100)
