"""Configurations of the tokenizer: plain dataclasses with presets and a JSON form.

The numbers of the presets B, L and XL are those of arXiv 2412.03069, table 11, and of the original
weights; ``tiny`` is small enough to train on two CPU cores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tokenflow_ext.models.serialization.config import (
    CODES_LIMIT,
    DEPTH_LIMIT,
    GRID_LIMIT,
    SCALES_LIMIT,
    SIDE_LIMIT,
    WIDTH_LIMIT,
    ConfigError,
    from_plain,
    need,
    to_plain,
    within,
)
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.towers.config import TowerConfig

QUANTIZER_KINDS = ("tokenflow", "var", "family")
CODES = ("table", "projected", "signs", "levels")
PRESETS = ("tiny", "B", "B-256", "L", "XL")


@dataclass(frozen=True)
class PixelConfig:
    """The VQGAN encoder and decoder; ``enabled = False`` switches the branch off (VQKD).

    Attributes:
        channels: width of the first level; level i has ``channels * multipliers[i]``.
        res_blocks: residual blocks a level in the encoder; the decoder has one more.
        decoder_channels, decoder_res_blocks: the decoder's own values where it differs (the
            enhanced decoder has 256 and 4); 0 takes the encoder's.
        z_channels: width between the networks and the convolutions to and from ``code_dim``.
        quant_kernel: side of these two convolutions: 1, or 3 in VAR's tokenizer.
        code_dim: channels of the pixel codebook.
        groups: GroupNorm groups; a width it does not divide takes their greatest common divisor.
        input_size: side to which an image of the configured size is resized before the encoder
            (the decoder's image is resized back); 0 keeps the size.
        patch: side of the pixel blocks that become channels before the first convolution, and back
            after the last (1, none, is VQGAN's own; 2 spares small machines the finest level).
        enabled: whether there are pixel encoder, codebook and decoder at all. Without them nothing
            is decoded to an image.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    decoder_channels: int = 0
    decoder_res_blocks: int = 0
    z_channels: int = 256
    code_dim: int = 8
    groups: int = 32
    input_size: int = 0
    patch: int = 1
    enabled: bool = True
    quant_kernel: int = 1

    def __post_init__(self) -> None:
        need(len(self.multipliers) > 0, "pixel.multipliers must name one level or more, got ()")
        need(
            len(self.multipliers) <= 12,  # each but the first halves the side
            f"pixel.multipliers must name 12 levels at most, got {len(self.multipliers)}",
        )
        for value in self.multipliers:
            within("pixel", 1, 256, multipliers=value)
        widths = ("channels", "z_channels", "code_dim", "groups")
        within("pixel", 1, WIDTH_LIMIT, **{name: getattr(self, name) for name in widths})
        within("pixel", 1, DEPTH_LIMIT, res_blocks=self.res_blocks)
        within("pixel", 1, 256, patch=self.patch)
        need(
            self.quant_kernel in (1, 3, 5, 7),
            f"pixel.quant_kernel must be 1, 3, 5 or 7, got {shown(self.quant_kernel)}",
        )
        within("pixel", 0, WIDTH_LIMIT, decoder_channels=self.decoder_channels)
        within("pixel", 0, DEPTH_LIMIT, decoder_res_blocks=self.decoder_res_blocks)
        within("pixel", 0, SIDE_LIMIT, input_size=self.input_size)
        widest = max(self.channels, self.decoder_channels) * max(self.multipliers)
        need(
            widest <= WIDTH_LIMIT,
            f"pixel.channels times the largest of pixel.multipliers must be {WIDTH_LIMIT} at most, "
            f"got {widest}",
        )

    @property
    def factor(self) -> int:
        """Pixels of the encoder's input a latent covers, per side."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class SemanticConfig:
    """The semantic encoder and decoder; ``tower.kind = 'none'`` switches the branch off.

    Attributes:
        tower: the encoder's vision tower.
        frozen: whether the tower's weights stay as they start (the head after it always trains).
        code_dim: channels of the semantic codebook.
        decoder_width, decoder_depth, decoder_heads: shape of the decoder's ViT.
        decoder_grid: side of the grid that the decoder's positions are made for.
    """

    tower: TowerConfig = field(default_factory=TowerConfig)
    frozen: bool = False
    code_dim: int = 32
    decoder_width: int = 768
    decoder_depth: int = 3
    decoder_heads: int = 12
    decoder_grid: int = 14

    def __post_init__(self) -> None:
        if not self.enabled:
            return
        need(
            self.tower.projection == 0,
            f"semantic.tower.projection must be 0, got {self.tower.projection}: the encoder reads "
            "the tokens before the visual projection",
        )
        widths = ("code_dim", "decoder_width", "decoder_heads")
        within("semantic", 1, WIDTH_LIMIT, **{name: getattr(self, name) for name in widths})
        within("semantic", 1, DEPTH_LIMIT, decoder_depth=self.decoder_depth)
        within("semantic", 1, GRID_LIMIT, decoder_grid=self.decoder_grid)
        need(
            self.decoder_width % self.decoder_heads == 0,
            "semantic.decoder_width must be a multiple of semantic.decoder_heads, got "
            f"{self.decoder_width} and {self.decoder_heads}",
        )

    @property
    def enabled(self) -> bool:
        """Whether the semantic branch exists."""
        return self.tower.enabled


@dataclass(frozen=True)
class FamilyConfig:
    """What a quantizer of ``kind = "family"`` is, see :class:`tokenflow_ext.Quantizer`; sizes,
    scales, ``beta``, ``l2_norm`` and updates are those of :class:`QuantizerConfig`.

    Attributes:
        code: ``table``, ``projected`` (SimVQ), ``signs`` (LFQ, BSQ) or ``levels`` (FSQ).
        group_dim: channels of a group, into which each branch is cut; 0: a branch is a group.
        index: ``own``: an index for each group, or ``shared``.
        depth: rounds at every scale.
        metric: ``l2`` or ``dot``.
        straight_through: ``scales``, ``identity`` or ``softmax`` (IBQ).
        errors: ``scales`` or ``running``.
        convolutions: VAR's between the scales, ``phi`` and ``phi_shared`` of the quantizer.
        spherical: signs at unit length.
        levels: of a group's channels.
        entropy, entropy_temperature, entropy_gamma, factorized: the loss of the choice of a code;
            an entropy of 0 is none.
        flips: share of signs inverted in training.
        upsampling: ``bicubic`` or ``bilinear``.
    """

    code: str = "table"
    group_dim: int = 0
    index: str = "own"
    depth: int = 1
    metric: str = "l2"
    straight_through: str = "scales"
    errors: str = "scales"
    convolutions: bool = False
    spherical: bool = False
    levels: tuple[int, ...] = ()
    entropy: float = 0.0
    entropy_temperature: float = 0.01
    entropy_gamma: float = 1.0
    factorized: bool = False
    flips: float = 0.0
    upsampling: str = "bicubic"

    def __post_init__(self) -> None:
        need(
            self.code in CODES,
            f"quantizer.family.code must be one of {', '.join(CODES)}, got {self.code!r}",
        )
        within("quantizer.family", 0, WIDTH_LIMIT, group_dim=self.group_dim)
        within("quantizer.family", 1, SCALES_LIMIT, depth=self.depth)
        within("quantizer.family", 0, 1e6, entropy=self.entropy)


@dataclass(frozen=True)
class QuantizerConfig:
    """The quantizer's arguments (``dims`` follow the branches).

    Attributes:
        kind: ``tokenflow`` (:class:`tokenflow_ext.MultiScaleQuantizer`; with one scale VQGAN's
            quantizer, with the grid's side repeated RQ-VAE's), ``var``
            (:class:`tokenflow_ext.var.VarQuantizer`, for one branch), whose codes are by itself
            not normalised: say ``l2_norm = False``, or ``family``
            (:class:`tokenflow_ext.Quantizer`).
        phi, phi_shared: of ``var``, and of ``family`` with convolutions: the share of the
            convolutions in the mix (0: none), and how many convolutions the scales share (0: one
            for each scale).
        family: what a quantizer of kind ``family`` is.
    """

    codebook_size: int = 32768
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14)
    weights: tuple[float, ...] | None = None
    beta: float = 0.25
    l2_norm: bool = True
    codebook_update: str = "gradient"
    usage_decay: float = 0.99
    scale_drop: float = 0.1
    kind: str = "tokenflow"
    phi: float = 0.5
    phi_shared: int = 4
    family: FamilyConfig = field(default_factory=FamilyConfig)

    def __post_init__(self) -> None:
        within("quantizer", 1, CODES_LIMIT, codebook_size=self.codebook_size)
        need(len(self.scales) > 0, "quantizer.scales must name one scale or more, got ()")
        need(
            len(self.scales) <= SCALES_LIMIT,
            f"quantizer.scales must name {SCALES_LIMIT} scales at most, got {len(self.scales)}",
        )
        for value in self.scales:
            within("quantizer", 1, GRID_LIMIT, scales=value)
        shares = {"usage_decay": self.usage_decay, "scale_drop": self.scale_drop}
        within("quantizer", 0, 1, **shares)
        within("quantizer", 0, 1e6, beta=self.beta)
        for weight in self.weights or ():
            within("quantizer", 0, 1e6, weights=weight)
        need(
            self.codebook_update in ("gradient", "ema"),
            f"quantizer.codebook_update must be 'gradient' or 'ema', got {self.codebook_update!r}",
        )
        need(
            self.kind in QUANTIZER_KINDS,
            f"quantizer.kind must be one of {', '.join(QUANTIZER_KINDS)}, got {self.kind!r}",
        )
        if self.kind == "var":
            self._check_var()
        need(
            self.kind == "family" or self.family == FamilyConfig(),
            f"quantizer.family is for quantizer.kind 'family', got kind {self.kind!r}",
        )

    def _check_var(self) -> None:
        need(
            self.codebook_update == "gradient",
            "quantizer.codebook_update must be 'gradient' with quantizer.kind 'var', got "
            f"{self.codebook_update!r}",
        )
        need(
            self.weights is None,
            f"quantizer.weights is not for quantizer.kind 'var', got {self.weights!r}",
        )
        need(0 <= self.phi <= 1, f"quantizer.phi must be within [0, 1], got {self.phi!r}")
        need(
            0 <= self.phi_shared <= len(self.scales),
            f"quantizer.phi_shared must be 0 to {len(self.scales)}, the number of scales, got "
            f"{self.phi_shared!r}",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that decides a :class:`~tokenflow_ext.models.TokenFlowTokenizer`'s shape.

    ``teacher`` is the tower whose features the semantic branch is distilled from; it is built apart
    (:func:`tokenflow_ext.models.towers.teachers.build_teacher`), and only its width shapes the
    tokenizer.
    """

    image_size: int = 224
    pixel: PixelConfig = field(default_factory=PixelConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    teacher: TowerConfig = field(default_factory=TowerConfig)

    def __post_init__(self) -> None:
        within("tokenizer", 1, SIDE_LIMIT, image_size=self.image_size)
        need(
            self.pixel.enabled or self.semantic.enabled,
            "pixel.enabled is false and semantic.tower.kind is 'none': a tokenizer has one of the "
            "two branches at least",
        )
        need(
            self.semantic.enabled or not self.teacher.enabled,
            f"teacher.kind is {self.teacher.kind!r} but semantic.tower.kind is 'none': switch both "
            "off or neither",
        )
        need(
            self.quantizer.kind != "var" or len(self.dims) == 1,
            "quantizer.kind 'var' is for one branch: its convolutions would mix the other's "
            "channels in; set pixel.enabled to false or semantic.tower.kind to 'none'",
        )
        weights = self.quantizer.weights
        need(
            weights is None or len(weights) == len(self.dims),
            f"quantizer.weights must hold a number for each of {', '.join(self.branches)}, got "
            f"{shown(weights)}",
        )
        if self.quantizer.kind == "family":
            self._check_family()
        if self.pixel.enabled:
            self._check_pixel()
        if self.teacher.enabled:
            grid = self.teacher.grid(self.image_size)
            need(
                grid == self.grid,
                f"the teacher's grid ({grid}) and the {self._measure} ({self.grid}) differ at "
                f"image_size {self.image_size}",
            )

    def _check_family(self) -> None:
        """By making the quantizer, without its memory: it says itself what means nothing."""
        import torch

        from .family_quantizer import FamilyQuantizer, arguments_of

        try:
            with torch.device("meta"):
                FamilyQuantizer(**arguments_of(self))
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"quantizer.family: {error}") from error

    def need_one_index(self, what: str) -> None:
        """That a token is one number of TokenFlow's or VAR's quantizer, which `what` is for.

        Raises:
            ConfigError: a quantizer of the family.
        """
        need(
            self.quantizer.kind != "family",
            f"{what} is of tokenizers with quantizer.kind 'tokenflow' or 'var', got 'family'",
        )

    def _check_pixel(self) -> None:
        side = self.pixel.input_size or self.image_size
        need(
            side % self.pixel.factor == 0,
            f"the pixel encoder's input side must be a multiple of {self.pixel.factor} "
            f"(pixel.patch, and 2 a level of pixel.multipliers after the first), got {side}",
        )
        if self.semantic.enabled:
            grid = self.semantic.tower.grid(self.image_size)
            need(
                grid == self.grid,
                f"the semantic tower's grid ({grid}) and the {self._measure} ({self.grid}) differ "
                f"at image_size {self.image_size}",
            )

    @property
    def _measure(self) -> str:
        """Whose grid is the tokenizer's."""
        return "pixel encoder's" if self.pixel.enabled else "semantic tower's"

    @property
    def grid(self) -> int:
        """Side of the latent grid at the configured image size."""
        if not self.pixel.enabled:
            return self.semantic.tower.grid(self.image_size)
        return (self.pixel.input_size or self.image_size) // self.pixel.factor

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths of the codebook groups, one for each of :attr:`branches`."""
        widths = {"semantic": self.semantic.code_dim, "pixel": self.pixel.code_dim}
        return tuple(widths[branch] for branch in self.branches)

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches there are, in the order of their channels: ``semantic``, ``pixel``."""
        found = {"semantic": self.semantic.enabled, "pixel": self.pixel.enabled}
        return tuple(branch for branch, enabled in found.items() if enabled)

    @property
    def semantic_dim(self) -> int:
        """Channels of the decoded semantic tokens: the teacher's width (0: no semantic branch)."""
        if not self.semantic.enabled:
            return 0
        return self.teacher.out_dim if self.teacher.enabled else self.semantic.tower.out_dim

    @classmethod
    def preset(cls, name: str) -> TokenizerConfig:
        """The configuration called ``tiny``, ``B`` (224 px), ``B-256``, ``L`` or ``XL``.

        Raises:
            ConfigError: another name.
        """
        if name == "tiny":
            return _tiny()
        if name in ("B", "B-256"):
            return _base(224 if name == "B" else 256)
        if name == "L":
            return _large()
        if name == "XL":
            return _xlarge()
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {shown(name)}")

    def with_enhanced_decoder(self) -> TokenizerConfig:
        """The same with the enhanced pixel decoder: twice the encoder's width and residual blocks
        a level (of the presets B, L and XL: 256 channels, 4 blocks, + 1 as in any decoder)."""
        pixel = dataclasses.replace(
            self.pixel,
            decoder_channels=2 * self.pixel.channels,
            decoder_res_blocks=2 * self.pixel.res_blocks,
        )
        return dataclasses.replace(self, pixel=pixel)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values (lists for tuples), ready for JSON or YAML."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenizerConfig:
        """Inverse of :meth:`to_dict`; fields left out take their defaults.

        Raises:
            ConfigError: an unknown field or a value of the wrong type, named by its path.
        """
        return from_plain(cls, values)


def _tiny() -> TokenizerConfig:
    # The tower is the teacher's own, frozen; crops of 64 px are upsampled to 128 so that its
    # stride of 16 gives the pixel encoder's 8 x 8 grid. On two cores and in minutes, blocks of
    # 4 x 4 pixels moved into channels reconstruct better than two finer levels, which would take
    # three times as long a step.
    tower = TowerConfig("efficientnet_lite0", 64, 16, width=112, input_scale=2.0)
    return TokenizerConfig(
        image_size=64,
        pixel=PixelConfig(
            channels=32, multipliers=(1, 2), res_blocks=1, z_channels=64, groups=8, patch=4
        ),
        semantic=SemanticConfig(
            tower,
            frozen=True,
            decoder_width=128,
            decoder_depth=3,
            decoder_heads=4,
            decoder_grid=8,
        ),
        quantizer=QuantizerConfig(codebook_size=1024, scales=(1, 2, 3, 4, 5, 6, 7, 8)),
        teacher=tower,
    )


def _base(image_size: int) -> TokenizerConfig:
    tower = TowerConfig("clip", 224, 16, width=768, depth=12, heads=12, mlp_width=3072)
    scales = (1, 2, 4, 6, 8, 10, 12, 14)
    return TokenizerConfig(
        image_size=image_size,
        semantic=SemanticConfig(tower),
        quantizer=QuantizerConfig(scales=scales if image_size == 224 else (*scales, 16)),
        teacher=dataclasses.replace(tower, projection=512),
    )


def _large() -> TokenizerConfig:
    tower = TowerConfig("vitamin", 256, 16, width=1152, variant="vitamin_xlarge_256")
    return TokenizerConfig(
        image_size=256,
        semantic=SemanticConfig(tower, decoder_width=1152, decoder_grid=16),
        quantizer=QuantizerConfig(scales=(1, 2, 4, 6, 8, 10, 12, 14, 16)),
        teacher=tower,
    )


def _xlarge() -> TokenizerConfig:
    tower = TowerConfig("siglip", 384, 14, width=1152, depth=27, heads=16, mlp_width=4304)
    return TokenizerConfig(
        image_size=384,
        pixel=PixelConfig(input_size=432),
        semantic=SemanticConfig(tower, decoder_width=1152, decoder_grid=27),
        quantizer=QuantizerConfig(scales=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)),
        teacher=tower,
    )
