"""Discriminators of the adversarial loss."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("patchgan", "stylegan")


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004, section 3.2.2): a logit for each overlapping patch.

    4x4 convolutions: ``layers`` of stride 2 with widths doubling from ``channels`` up to eight
    times it, one of stride 1, and one to a single channel. Batch statistics would tie the images of
    a batch (and the processes) together, so GroupNorm stands where the original has BatchNorm;
    ``norm="batch"`` gives the original.

    Args:
        channels: width of the first layer.
        layers: layers of stride 2 (3: a receptive field of 70 pixels).
        norm: ``group``, ``batch`` or ``none``.
    """

    def __init__(
        self, channels: int = 64, layers: int = 3, in_channels: int = 3, norm: str = "group"
    ) -> None:
        super().__init__()
        if norm not in ("group", "batch", "none"):
            raise ValueError(f"norm must be 'group', 'batch' or 'none', got {norm!r}")
        if channels < 1 or layers < 1:
            raise ValueError(f"channels and layers must be positive, got {channels} and {layers}")

        def normalise(width: int) -> nn.Module:
            if norm == "batch":
                return nn.BatchNorm2d(width)
            if norm == "group":
                return nn.GroupNorm(_groups(width), width)
            return nn.Identity()

        parts: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for i in range(1, layers + 1):
            following = channels * min(2**i, 8)
            parts += [
                nn.Conv2d(
                    width,
                    following,
                    4,
                    stride=2 if i < layers else 1,
                    padding=1,
                    bias=norm == "none",
                ),
                normalise(following),
                nn.LeakyReLU(0.2),
            ]
            width = following
        parts.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*parts)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> logits [B, 1, h, w] (high: real)."""
        return self.main(images)


def _groups(width: int) -> int:
    groups = min(32, width)
    while width % groups:
        groups -= 1
    return groups


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class StyleGanDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator (arXiv 1912.04958, section 3): one logit an image.

    Residual blocks halve the sides, down to 4 to 7 places, and double the width, up to eight times
    ``channels``; with 64 the widths at 256 pixels are StyleGAN2's and LlamaGen's. Then the
    deviation within a group of images as one more channel (arXiv 1710.10196, section 3), a
    convolution, and two linear layers.

    As LlamaGen's it has plain weights, no equalised learning rate. LlamaGen's leaves the deviation
    out too; ``group=1`` does.

    Args:
        image_size: side of the images in pixels, 8 or more; no power of two is asked for.
        channels: width at the images' own size.
        group: images that are compared with each other: consecutive ones, so that a batch can be
            cut, or dealt out to processes, wherever a group ends.

    Raises:
        ValueError: a size below 8, or ``channels`` or ``group`` below 1.
    """

    def __init__(self, image_size: int, channels: int = 64, group: int = 4) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"image_size must be 8 or more, got {image_size}")
        if channels < 1 or group < 1:
            raise ValueError(f"channels and group must be positive, got {channels} and {group}")
        self.image_size, self.group = image_size, group
        halvings = int(math.log2(image_size // 4))
        widths = [channels * min(2**i, 8) for i in range(halvings + 1)]
        width, side = widths[-1], image_size >> halvings
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_HalvingBlock(a, b) for a, b in itertools.pairwise(widths))
        self.conv_out = nn.Conv2d(width + (group > 1), width, 3, padding=1)
        self.linear = nn.Linear(width * side * side, width)
        self.logit = nn.Linear(width, 1)
        self.apply(_initialise_by_fan)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [-1, 1] -> logits [B, 1] (high: real).

        Raises:
            ValueError: images of another size, or a batch that is no whole number of groups.
        """
        if tuple(images.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images must be [B, 3, {self.image_size}, {self.image_size}], got "
                f"{tuple(images.shape)}"
            )
        x = _leaky(self.conv_in(images))
        for block in self.blocks:
            x = block(x)
        if self.group > 1:
            x = torch.cat([x, group_deviation(x, self.group).to(x.dtype)], dim=1)
        x = _leaky(self.conv_out(x))
        return self.logit(_leaky(self.linear(x.flatten(1))))


class _HalvingBlock(nn.Module):
    """Two 3x3 convolutions and a blurred halving, beside a blurred halving and a 1x1 convolution;
    their sum over sqrt(2), which keeps the variance."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.halve = BlurHalve()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C_out, H // 2, W // 2]."""
        y = self.halve(_leaky(self.conv2(_leaky(self.conv1(x)))))
        return (y + self.skip(self.halve(x))) / math.sqrt(2)


class BlurHalve(nn.Module):
    """Every second pixel after the filter [1, 3, 3, 1] / 8 along rows and columns, zeros outside
    (arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.empty(1, 1, 4, 4), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The filter."""
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.kernel.copy_(torch.outer(taps, taps)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H // 2, W // 2]."""
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def group_deviation(x: Tensor, group: int) -> Tensor:
    """How much the images of each group differ: [B, C, H, W] -> [B, 1, H, W], float32 (float64 of
    float64), alike in all of a group.

    The population's standard deviation over ``group`` consecutive images, averaged over channels
    and places.

    Raises:
        ValueError: a batch that is no whole number of groups.
    """
    batch, _, height, width = x.shape
    if batch % group:
        raise ValueError(f"the batch must be a multiple of the group's {group} images, got {batch}")
    x = x if x.dtype == torch.float64 else x.float()
    variance = x.unflatten(0, (-1, group)).var(1, correction=0)
    # Not 0 under the root, whose slope there is infinite.
    value = (variance + 1e-8).sqrt().mean((1, 2, 3))
    return value.repeat_interleave(group).view(batch, 1, 1, 1).expand(-1, 1, height, width)


def build_discriminator(kind: str, image_size: int, channels: int = 64) -> nn.Module:
    """The discriminator called ``patchgan`` or ``stylegan``, ``channels`` wide in its first layer.

    Raises:
        ValueError: another kind.
    """
    if kind == "patchgan":
        return PatchDiscriminator(channels)
    if kind == "stylegan":
        return StyleGanDiscriminator(image_size, channels)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _initialise_by_fan(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, 0.2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
