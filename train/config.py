"""Configuration of a training run: dataclasses, YAML files and dotted command-line overrides.

A configuration is made in this order, later wins: the defaults below, the preset of the model, the
YAML file, the command line (``optim.lr=3e-4`` or ``--optim.lr 3e-4``). An unknown key and a value
of the wrong type are errors that name the key.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models.losses.discriminators import KINDS as DISCRIMINATORS
from tokenflow_ext.models.losses.tokenizer import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from tokenflow_ext.models.serialization.config import ConfigError, from_plain, to_plain
from tokenflow_ext.models.serialization.files import brief, read_text, shown
from tokenflow_ext.models.text_to_image.sequence import BackboneConfig
from tokenflow_ext.models.tokenizer.config import TokenizerConfig
from tokenflow_ext.sampler import SamplingConfig


@dataclass
class DataConfig:
    """What is trained on.

    ``path`` is a folder of images (searched in all its folders), or of WebDataset shards
    (``*.tar``); without it the photographs that ship inside scikit-image and scikit-learn are used.
    ``held_out`` is a second such folder for the evaluation; without it, part of the data is set
    aside and never trained on: some of the images, or the first shard.
    """

    path: str | None = None
    held_out: str | None = None
    held_out_crops: int = 96
    min_crop: float = 0.25  # side of the smallest random crop, as a share of the shorter side
    max_crop: float = 0.6
    aspect: float = 1.15  # width / height of a random crop lies within [1 / aspect, aspect]
    flip: bool = True
    # How much oftener than once a round an image comes: a file of {"file_name": ..., "weight": ...}
    # a line for a folder, a key of KEY.json for shards.
    weights: str | None = None
    weight_key: str = ""
    streams: tuple[int, ...] = (1, 1)  # as in CaptionConfig
    workers: int = 0  # processes that decode images; none: in the training process itself
    cache: int = 256  # MiB of decoded images that a process keeps, the first that fit


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
class PartRates:
    """Learning rates of the tokenizer's parts as shares of ``optim.lr``; 0 freezes a part."""

    semantic_tower: float = 1.0
    semantic_head: float = 1.0  # from the tower's width to the semantic codebook's
    pixel_encoder: float = 1.0
    codebooks: float = 1.0
    semantic_decoder: float = 1.0
    pixel_decoder: float = 1.0


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
class TokenizerOptimConfig(OptimConfig):
    """With learning rates by part."""

    lr_scale: PartRates = field(default_factory=PartRates)


@dataclass
class PixelLossConfig:
    """Losses of the decoded images and their weights; 0 switches one off (arXiv 2412.03069,
    section 3.2).

    L_pix = pixel * L2 + perceptual * LPIPS + gan * L_G, the last from step ``gan_start`` on.
    """

    pixel: float = 1.0
    perceptual: float = 0.0
    perceptual_weights: str | None = None  # torchvision's VGG16 file
    gan: float = 0.0
    gan_start: int = 20000
    # Times the ratio of the other losses' gradient to L_G's at the last layer (VQGAN); the released
    # training has it off.
    gan_adaptive: bool = False
    discriminator: str = "patchgan"  # or "stylegan"
    discriminator_channels: int = 64  # of its first layer
    discriminator_loss: str = "hinge"  # or "vanilla", "non-saturating" (the same cross-entropy)
    generator_loss: str = "hinge"  # or "non-saturating"


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
class TextOptimConfig:
    """As :class:`OptimConfig`; ``ema_decay = 0`` keeps no moving average of the weights."""

    steps: int = 1500
    batch: int = 16
    accumulate: int = 1
    lr: float = 1.0e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: str = "cosine"  # or "constant"
    warmup: int = 50
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
    # The image tokenizer: a run, a checkpoint, a save_pretrained folder, or a released file.
    tokenizer: str = "runs/emoji-tokenizer"
    resolution: int | None = None  # of a released B: 224 or 256
    backbone: str | None = None  # pretrained: a folder of transformers, or a GGUF file
    init: str | None = None  # a run, checkpoint or save_pretrained folder to start from
    parallel: str = "ddp"  # or "fsdp": weights, gradients and optimizer split over processes
    data: CaptionConfig = field(default_factory=CaptionConfig)
    optim: TextOptimConfig = field(default_factory=TextOptimConfig)
    model: TextModelConfig = field(default_factory=TextModelConfig)
    sample: SamplingConfig = field(default_factory=SamplingConfig)  # of the run's pictures
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _check_run(self)
        _check_parallel(self)
        _one_of("model.attention", self.model.attention, "sdpa", "flex")
        if self.backbone is not None and self.init is not None:
            raise ConfigError("backbone and init are two starts: give one")
        for name in ("match", "unseen"):
            try:
                re.compile(getattr(self.data, name))
            except re.error as error:
                raise ConfigError(f"data.{name} is no regular expression: {error}") from error
        if self.data.unseen and self.data.held_out is not None:
            raise ConfigError("data.unseen and data.held_out are two held-out sets: give one")
        if not self.data.caption_keys or not all(self.data.caption_keys):
            raise ConfigError(
                f"data.caption_keys must name keys, got {list(self.data.caption_keys)}"
            )


@dataclass
class DecoderConfig:
    """Everything that decides a run of ``train/decoder.py``."""

    run: str = "runs/decoder"
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    checkpointing: bool = False  # as in TrainConfig, and compile
    compile: bool = False
    # The tokenizer: a run, a checkpoint, a save_pretrained folder, or a released file.
    init: str = "runs/tokenizer"
    resolution: int | None = None  # of a released B: 224 or 256
    # "kept": its pixel decoder goes on from where it is. "enhanced": one of twice the width and
    # twice the residual blocks starts anew, unless it has those already.
    decoder: str = "kept"
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=300, lr=1.0e-3))
    loss: PixelLossConfig = field(default_factory=PixelLossConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _check_run(self)
        _one_of("decoder", self.decoder, "kept", "enhanced")
        _check_pixel_losses(self)
        if not self.loss.pixel + self.loss.perceptual > 0:
            raise ConfigError("loss.pixel and loss.perceptual are both 0: give one a weight")


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
        _check_run(self)
        _check_parallel(self)
        _one_of("loss.semantic_kind", self.loss.semantic_kind, "cosine", "l2")
        _check_pixel_losses(self)
        if not self.model.pixel.enabled:
            self._check_semantic_alone()
        self._check_rates()

    def _check_rates(self) -> None:
        """Codebooks that are frozen must not be moved by something else."""
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


def _check_run(config: TrainConfig | DecoderConfig | TextConfig) -> None:
    """What runs of every kind have in common."""
    _one_of("optim.schedule", config.optim.schedule, "cosine", "constant")
    _one_of("optim.precision", config.optim.precision, "fp32", "bf16", "fp16")
    if len(config.data.streams) != 2:
        raise ConfigError(f"data.streams must be two numbers, got {shown(config.data.streams)}")
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optim.betas must be two numbers from 0 to below 1, got {shown(betas)}")
    if not config.run or "\0" in config.run:
        raise ConfigError(f"run must name a folder, got {shown(config.run)}")
    _check_ranges(config)


def _check_parallel(config: TrainConfig | TextConfig) -> None:
    _one_of("parallel", config.parallel, "ddp", "fsdp")
    if config.parallel == "fsdp" and config.optim.precision == "fp16":
        raise ConfigError("optim.precision=fp16 is not for parallel=fsdp: use bf16")


def _check_pixel_losses(config: TrainConfig | DecoderConfig) -> None:
    loss = config.loss
    _one_of("loss.discriminator", loss.discriminator, *DISCRIMINATORS)
    _one_of("loss.discriminator_loss", loss.discriminator_loss, *DISCRIMINATOR_LOSSES)
    _one_of("loss.generator_loss", loss.generator_loss, *GENERATOR_LOSSES)


_MANY = 10**12
#: The least and the largest value of every number; of a list, of each of its numbers.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "threads": (0, 4096),
    "resolution": (1, 1 << 14),
    "data.held_out_crops": (1, 1 << 20),
    "data.min_crop": (0, 1),
    "data.max_crop": (1e-3, 1),
    "data.aspect": (1, 100),
    "data.limit": (0, _MANY),
    "data.evaluated": (1, 1 << 20),
    "data.drop": (0, 1),
    "data.truncate": (0, 1),
    "data.streams": (1, 1 << 16),
    "data.workers": (0, 1024),
    "data.cache": (0, 1 << 24),
    "optim.steps": (1, _MANY),
    "optim.batch": (1, 1 << 20),
    "optim.accumulate": (1, 1 << 20),
    "optim.lr": (0, math.inf),
    "optim.discriminator_lr": (0, math.inf),
    "optim.betas": (0, 1),
    "optim.weight_decay": (0, math.inf),
    "optim.warmup": (0, _MANY),
    "optim.final_lr": (0, math.inf),
    "optim.max_grad_norm": (0, math.inf),
    "optim.ema_decay": (0, 1),
    **{f"optim.lr_scale.{part.name}": (0, math.inf) for part in fields(PartRates)},
    "loss.semantic": (0, math.inf),
    "loss.vq": (0, math.inf),
    "loss.pixel": (0, math.inf),
    "loss.perceptual": (0, math.inf),
    "loss.gan": (0, math.inf),
    "loss.gan_start": (0, _MANY),
    "loss.discriminator_channels": (1, 1 << 12),
    "codebook.kmeans_batches": (0, 1 << 20),
    "codebook.kmeans_iterations": (1, 1 << 20),
    "codebook.restart_every": (0, _MANY),
    "codebook.restart_until": (0, 1),
    "codebook.restart_threshold": (0, math.inf),
    "model.prompt_length": (1, 1 << 16),
    "model.vocabulary": (257, 1 << 24),  # every byte, and bos
    "sample.guidance": (0, math.inf),
    "sample.top_k": (0, 2**31 - 1),
    "sample.top_p": (0, 1),
    "sample.min_p": (0, 1),
    "sample.temperature": (1e-6, math.inf),
    **{f"output.{every}_every": (1, _MANY) for every in ("log", "eval", "picture", "checkpoint")},
    "output.keep": (1, 1 << 20),
    "output.pictures": (1, 1 << 12),
}


def leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys: ``{"optim.lr": 0.1}``."""
    if not isinstance(values, dict):
        return {path: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{path}.{key}" if path else key)
    return found


def _check_ranges(config: TrainConfig | DecoderConfig | TextConfig) -> None:
    for key, given in leaves(to_plain(config)).items():
        low, high = _RANGES.get(key, (-math.inf, math.inf))
        for value in given if isinstance(given, list) else [given]:
            if key not in _RANGES or value is None or low <= value <= high:
                continue
            wanted = f"{low} or more" if high in (_MANY, math.inf) else f"within [{low}, {high}]"
            raise ConfigError(f"{key} must be {wanted}, got {shown(value)}")


def _one_of(key: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {shown(value)}")


class _Loader(yaml.SafeLoader):
    """YAML whose floats are those of YAML 1.2: ``1e-4`` is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


_FILE_LIMIT = 1 << 20  # bytes
_NODE_LIMIT = 100_000


def _read_yaml(text: str, what: str) -> Any:
    """YAML as plain values.

    Raises:
        ConfigError: no YAML, or aliases that stand for more than a configuration can hold.
    """
    try:
        loader = _Loader(text)  # a SafeLoader
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if not _nodes(node, {}) <= _NODE_LIMIT:
                raise ConfigError(
                    f"{what} stands for more than {_NODE_LIMIT} values by its aliases"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date without a 13th month, ...
        raise ConfigError(f"{what} is not YAML: {brief(error)}") from error


def _nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there would be if each alias were written out; infinite for one in itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = math.inf
    count = 1.0
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                count += _nodes(part, known)
    known[id(node)] = count
    return count


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
                raise ConfigError(f"expected key=value or --key value, got {shown(word)}")
            text = rest.pop(0)
        *sections, name = key.split(".")
        if len(sections) > 16:
            raise ConfigError(f"unknown field {shown(key)}")
        # YAML knows no bytes that are not UTF-8; a file may have them in its name.
        plain = any("\udc80" <= character <= "\udcff" for character in text)
        value: Any = {name: text if plain else _read_yaml(text, key)}
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


Config = TypeVar("Config", "TrainConfig", "DecoderConfig", "TextConfig")


def _load(kind: type[Config], path: str | Path | None, overrides: list[str] | None) -> Config:
    """The configuration of an optional file and overrides, over the defaults and the preset."""
    given: Any = {}
    if path is not None:
        text = read_text(Path(path), ConfigError, _FILE_LIMIT)
        given = _read_yaml(text, str(path))
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise ConfigError(f"{path} must hold a mapping, got {type(given).__name__}")
    given = _overlay(given, parse_overrides(overrides or []))
    try:
        below = kind()
        if kind is TrainConfig:
            below = TrainConfig(model=TokenizerConfig.preset(given.get("preset", "tiny")))
        return from_plain(kind, _overlay(to_plain(below), given))
    except ConfigError as error:
        if path is None:
            raise
        more = " and the command line" if overrides else ""
        raise ConfigError(f"{path}{more}: {error}") from error


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of a tokenizer's run from an optional YAML file and overrides.

    Raises:
        ConfigError: unknown keys, wrong types, numbers out of their range, or a file that is not a
            YAML mapping.
    """
    return _load(TrainConfig, path, overrides)


def load_decoder_config(
    path: str | Path | None = None, overrides: list[str] | None = None
) -> DecoderConfig:
    """The configuration of a pixel decoder's fine-tuning; as :func:`load_config`."""
    return _load(DecoderConfig, path, overrides)


def load_text_config(
    path: str | Path | None = None, overrides: list[str] | None = None
) -> TextConfig:
    """The configuration of a text-to-image run; as :func:`load_config`."""
    return _load(TextConfig, path, overrides)


def from_yaml(text: str, what: str) -> dict[str, Any]:
    """What :func:`to_yaml` wrote, as dotted keys and plain values.

    Args:
        what: what messages call it.

    Raises:
        ConfigError: no YAML mapping.
    """
    values = _read_yaml(text, what)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{what} must hold a mapping")
    return leaves(values)


def to_yaml(config: TrainConfig | DecoderConfig | TextConfig) -> str:
    """The configuration as YAML that the functions above read back as it was."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None, width=100)


__getattr__ = renamed(__name__, {"SampleConfig": "tokenflow_ext.sampler:SamplingConfig"})
