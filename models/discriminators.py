"""Discriminators of the adversarial loss."""

from __future__ import annotations

from torch import Tensor, nn


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
