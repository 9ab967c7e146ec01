"""Measures of reconstruction: of images, of the codes in use, of distributions of features.

Images are [B, C, H, W], floating point in [-1, 1] (clamped to it) or 8 bits (uint8). Both are
measured on the scale of 0 to 1, 8 bits in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 7


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to 8 bits: 127.5 x + 128, clamped to 0-255, truncated (uint8)."""
    return (images.detach().float() * 127.5 + 128.0).clamp(0.0, 255.0).to(torch.uint8)


def to_unit(images: Tensor) -> Tensor:
    """Images of either kind on the scale of 0 to 1: uint8 as float64, the others as float32."""
    if images.dtype == torch.uint8:
        return images.double() / 255.0
    return (images.detach().float().clamp(-1, 1) + 1.0) / 2.0


def _pair(a: Tensor, b: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(
            f"a and b must have one shape [B, C, H, W], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return to_unit(a), to_unit(b)


def psnr(a: Tensor, b: Tensor, *, reduction: str = "mean") -> Tensor:
    """Peak signal-to-noise ratio of images in dB: the peak is the whole range, black to white.

    Args:
        reduction: ``mean`` over the images' own values (0-dim), or ``none`` ([B]).

    Raises:
        ValueError: shapes that differ, or another reduction. Equal images give infinity.
    """
    a, b = _pair(a, b, reduction)
    values = -10.0 * torch.log10((a - b).square().mean(dim=(1, 2, 3)))
    return values.mean() if reduction == "mean" else values


def ssim(a: Tensor, b: Tensor, *, data_range: float = 1.0, reduction: str = "mean") -> Tensor:
    """Structural similarity as scikit-image's defaults have it.

    Uniform windows of 7 x 7 pixels that lie inside the image, sample (co)variances (n - 1),
    K1 0.01, K2 0.03, mean over windows and channels.

    Args:
        data_range: L in the constants (K1 L)^2 and (K2 L)^2, on the scale of 0 to 1 that the
            images are measured on: 1 is the range they have; with 2 the constants weigh four times
            as much, and the value is higher.
        reduction: ``mean`` over the images (0-dim), or ``none`` ([B]).

    Raises:
        ValueError: shapes that differ or are smaller than a window, or another reduction.
    """
    a, b = _pair(a, b, reduction)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels a side, got {tuple(a.shape)}")

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, SSIM_WINDOW, stride=1)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    count = SSIM_WINDOW**2
    sample = count / (count - 1)
    mean_a, mean_b = mean(a), mean(b)
    variances = sample * (mean(a * a) - mean_a * mean_a + (mean(b * b) - mean_b * mean_b))
    covariance = sample * (mean(a * b) - mean_a * mean_b)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    values = (luminance * (2 * covariance + c2) / (variances + c2)).mean(dim=(1, 2, 3))
    return values.mean() if reduction == "mean" else values


def code_usage(hits: Tensor) -> tuple[float, float]:
    """(share of the codes that were hit, perplexity exp(entropy) of the hits) of counts [K]."""
    share = hits.double() / hits.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return (hits > 0).double().mean().item(), entropy.exp().item()


class FeatureSums:
    """Count, sum and sum of outer products of feature rows, in float64: all that a Gaussian's mean
    and covariance need, and sums of several processes add up to those of all rows."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def __iter__(self) -> Iterator[Tensor]:
        """The three tensors, to be reduced in place."""
        return iter((self.count, self.total, self.outer))

    def add(self, features: Tensor) -> None:
        """Count rows [B, width]."""
        rows = features.detach().double()
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.outer.addmm_(rows.T, rows)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """(mean [width], sample covariance [width, width]), float64.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows or more, got {int(self.count)}")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, (covariance + covariance.T) / 2


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians (mean, covariance).

    With C = F F^T for both (eigenvectors times roots of eigenvalues, which exist without full rank
    too), the trace of (C1 C2)^(1/2) is the sum of F1^T F2's singular values: no square root of a
    product that is not symmetric, and none of a difference that cancelled.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = one, other

    def factor(covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance.double())
        return vectors * values.clamp_min(0).sqrt()

    f1, f2 = factor(covariance_1), factor(covariance_2)
    traces = f1.square().sum() + f2.square().sum()
    cross = torch.linalg.svdvals(f1.T @ f2).sum()
    distance = (mean_1.double() - mean_2.double()).square().sum() + traces - 2 * cross
    return max(0.0, distance.item())


def cosine(pred: Tensor, target: Tensor) -> Tensor:
    """Mean cosine of tokens [B, N, C] with their targets (0-dim)."""
    if pred.shape != target.shape:
        raise ValueError(
            f"pred and target must have one shape, got {tuple(pred.shape)} and "
            f"{tuple(target.shape)}"
        )
    return F.cosine_similarity(pred.float(), target.float(), dim=-1).mean()
