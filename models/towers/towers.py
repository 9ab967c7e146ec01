"""Vision towers: of the semantic encoder and of its teachers (arXiv 2412.03069, section 3.1).

timm is imported where a tower of its is built, never before; the other towers are plain PyTorch.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext.errors import MissingPackageError as MissingPackageError
from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.var import resize

from .config import TowerConfig
from .networks import (
    ClipTransformer,
    NormRelu6,
    SameConv2d,
    SiglipEmbeddings,
    SiglipEncoder,
    efficientnet_lite0_blocks,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resample_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions for another grid: class position kept, the others bicubic.

    The scale factor (grid + 0.1) / base is handed to the interpolation as it is, so its sampling
    points differ slightly from those of a resize to the same size. The original weights were made
    with these points.

    Args:
        positions: [1, 1 + base**2, C], the class token's first.
        grid: (rows, columns) wanted.

    Returns:
        [1, 1 + rows * columns, C]; ``positions`` itself for the base grid.
    """
    base = round((positions.shape[1] - 1) ** 0.5)
    if tuple(grid) == (base, base):
        return positions
    image = positions[:, 1:].reshape(1, base, base, -1).permute(0, 3, 1, 2)
    image = F.interpolate(
        image.float(),
        scale_factor=tuple((side + 0.1) / base for side in grid),
        mode="bicubic",
        align_corners=False,
    )
    if tuple(image.shape[-2:]) != tuple(grid):
        raise ValueError(f"positions of a {base} x {base} grid cannot be resampled to {grid}")
    image = image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat([positions[:, :1], image.to(positions.dtype)], dim=1)


class PixelNorm(nn.Module):
    """Images in [-1, 1] to a tower's pixels: to [0, 1] clamped, then mean and deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self._values = {"mean": mean, "std": std}
        for name in self._values:
            self.register_buffer(name, torch.empty(1, 3, 1, 1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mean and deviation as given."""
        for name, values in self._values.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> [B, 3, H, W]."""
        # By way of 0-255 although (x + 1) / 2 is the same number: rounding follows the original
        # tokenizers', whose tokens can turn on the last bit.
        return (((images + 1.0) * 127.5).clamp(0.0, 255.0) / 255.0 - self.mean) / self.std


class Tower(nn.Module):
    """A vision tower: images [B, 3, H, W] in [-1, 1] to patch tokens [B, N, C], row by row."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config

    def layers(self) -> list[nn.Module]:
        """The blocks that follow each other, none a part of another."""
        raise NotImplementedError

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the tokens of ``images``."""
        return self.config.grid(images.shape[-2]), self.config.grid(images.shape[-1])

    def scaled(self, images: Tensor) -> Tensor:
        """Images at the size that the tower reads them (bicubic)."""
        scale = self.config.input_scale
        height, width = images.shape[-2:]
        return resize(images, (round(height * scale), round(width * scale)))


class ClipTower(Tower):
    """CLIP's ViT (OpenAI's: QuickGELU), patch tokens after ``ln_post``.

    Images go in as they are, in [-1, 1], as the original weights were trained. With
    ``config.projection`` the tokens are multiplied by the visual projection (the teacher's form).
    Names of the weights are OpenAI's, as in open_clip.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        width = config.width
        count = 1 + (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(count, width))
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = ClipTransformer(width, config.depth, config.heads, config.mlp_width)
        self.ln_post = nn.LayerNorm(width)
        if config.projection:
            self.proj = nn.Parameter(torch.empty(width, config.projection))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings and projection normal, deviation 1 / sqrt(width); the rest resets itself."""
        for own in self.parameters(recurse=False):
            nn.init.normal_(own, std=self.config.width**-0.5)

    def layers(self) -> list[nn.Module]:
        return list(self.transformer.resblocks)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> tokens [B, N, width or projection]."""
        x = self.conv1(self.scaled(images))
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + resample_positions(self.positional_embedding.unsqueeze(0), grid).to(x.dtype)
        x = self.ln_post(self.transformer(self.ln_pre(x))[:, 1:])
        return x @ self.proj.to(x.dtype) if self.config.projection else x


class VitaminTower(Tower):
    """ViTamin's ``forward_features`` (timm) of CLIP-normalised pixels."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.pixels = PixelNorm(CLIP_MEAN, CLIP_STD)
        self.trunk: Any = _vitamin(config.variant, config.image_size)
        if self.trunk.num_features != config.width:
            raise ConfigError(
                f"tower.width is {config.width}, but {config.variant} is "
                f"{self.trunk.num_features} wide"
            )

    def layers(self) -> list[nn.Module]:
        # By the names that their weights are published under: two stages of convolutions, then the
        # transformer.
        name = re.compile(r"(patch_embed\.backbone\.stages\.\d+|blocks)\.\d+")
        return [module for path, module in self.trunk.named_modules() if name.fullmatch(path)]

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> tokens [B, N, width]."""
        return self.trunk.forward_features(self.pixels(self.scaled(images)))


class SiglipTower(Tower):
    """SigLIP's vision model (transformers) up to ``hidden_states[-2]``.

    That is the output of the last layer but one, before ``post_layernorm``: the last layer, the
    norm and the pooling head are not built.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.pixels = PixelNorm(SIGLIP_MEAN, SIGLIP_STD)
        self.embeddings = SiglipEmbeddings(config.image_size, config.patch_size, config.width)
        self.encoder = SiglipEncoder(config.width, config.depth - 1, config.heads, config.mlp_width)

    def layers(self) -> list[nn.Module]:
        return list(self.encoder.layers)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> tokens [B, N, width]."""
        return self.encoder(self.embeddings(self.pixels(self.scaled(images))))


class EfficientNetLite0Tower(Tower):
    """EfficientNet-Lite0 (timm) up to its 112 channels at stride 16.

    Batch statistics stay those of the weights in training too: a batch of crops is too small and
    too alike to estimate them anew.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        if (config.width, config.patch_size) != (112, 16):
            raise ConfigError(
                "EfficientNet-Lite0 gives 112 channels at stride 16: tower.width and "
                f"tower.patch_size must say so, got {config.width} and {config.patch_size}"
            )
        self.pixels = PixelNorm(IMAGENET_MEAN, IMAGENET_STD)
        self.conv_stem = SameConv2d(3, 32, 3, stride=2)
        self.bn1 = NormRelu6(32)
        self.blocks = efficientnet_lite0_blocks()

    def train(self, mode: bool = True) -> EfficientNetLite0Tower:
        """Sets the mode; BatchNorm stays in evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def layers(self) -> list[nn.Module]:
        return [block for stage in self.blocks.children() for block in stage.children()]

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> tokens [B, N, 112]."""
        # Channels last: on a CPU the tower takes two thirds of the time so (batch 32, 128 px).
        x = self.pixels(self.scaled(images)).contiguous(memory_format=torch.channels_last)
        x = self.bn1(self.conv_stem(x))
        return self.blocks(x).flatten(2).transpose(1, 2)


def _vitamin(variant: str, image_size: int) -> nn.Module:
    """timm's ViTamin up to its last block, with random weights."""
    try:
        import timm
    except ImportError as error:
        raise MissingPackageError(
            f"the tower {variant} needs timm: pip install 'tokenflow_ext[models]' ({error})"
        ) from error
    if not timm.is_model(variant):
        raise ConfigError(f"tower.variant {variant!r} is not a model of timm {timm.__version__}")
    # Published weights have no norm after the pooling, which forward_features leaves out.
    return timm.create_model(
        variant, pretrained=False, img_size=image_size, num_classes=0, final_norm=False
    )


_TOWERS = {
    "clip": ClipTower,
    "vitamin": VitaminTower,
    "siglip": SiglipTower,
    "efficientnet_lite0": EfficientNetLite0Tower,
}


def build_tower(config: TowerConfig) -> Tower:
    """The tower of ``config`` with random weights.

    Raises:
        ConfigError: kind ``none``, or a width that the model does not have.
        MissingPackageError: the tower's package is not installed.
    """
    if not config.enabled:
        raise ConfigError("tower kind 'none' cannot be built")
    return _TOWERS[config.kind](config)
