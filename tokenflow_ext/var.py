"""VAR's residual pyramid: convolutions between its scales (arXiv 2404.02905, algorithms 1 and 2).

`VarQuantizer` is `MultiScaleQuantizer` with that pyramid in place of TokenFlow's; the loop and the
convolutions are those of `compat.VectorQuantizer2`, VAR's own class, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from ._deprecated import renamed
from .ops import Size
from .quantizer import MultiScaleQuantizer


class Phi(nn.Conv2d):
    """h + r (conv(h) - h): a 3 x 3 convolution mixed in by `|quant_resi| = r`."""

    def __init__(self, embed_dim: int, quant_resi: float) -> None:
        super().__init__(embed_dim, embed_dim, 3, padding=1)
        self.resi_ratio = abs(quant_resi)

    def forward(self, h: Tensor) -> Tensor:
        assert self.bias is not None
        # In the features' dtype: half weights are computed with in float32.
        convolved = F.conv2d(h, self.weight.to(h.dtype), self.bias.to(h.dtype), padding=1)
        return h.lerp(convolved, self.resi_ratio)


def _nearest_tick(count: int, position: float) -> int:
    """Which of `count` convolutions is for a scale at `position`, 0 the coarsest and 1 the finest.

    Their positions are even, the first 1 / 2 count from the end. VAR puts that of four at
    1 / 3 count.
    """
    first = 1 / 3 / count if count == 4 else 1 / 2 / count
    last = 1 - first
    step = (last - first) / max(1, count - 1)
    # Scales do fall half way between two positions: the order of rounding below decides as VAR's.
    positions = [i * step + first for i in range(count - 1)] + [last]
    return min(range(count), key=lambda i: abs(positions[i] - position))


class PhiShared(nn.Module):
    """One convolution for every scale."""

    def __init__(self, qresi: nn.Module) -> None:
        super().__init__()
        self.qresi = qresi

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi


class PhiPartiallyShared(nn.Module):
    """A few convolutions; a scale takes the one whose position is nearest."""

    def __init__(self, qresi_ls: nn.ModuleList) -> None:
        super().__init__()
        self.qresi_ls = qresi_ls

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi_ls[_nearest_tick(len(self.qresi_ls), position)]


class PhiNonShared(nn.ModuleList):
    """As many convolutions as scales."""

    def __getitem__(self, position: float) -> nn.Module:  # type: ignore[override]
        return super().__getitem__(_nearest_tick(len(self), position))


def make_phis(
    channels: int, ratio: float, shared: int, scales: int
) -> PhiShared | PhiPartiallyShared | PhiNonShared:
    """The convolutions of a pyramid, by a scale's position from 0 (coarsest) to 1.

    Args:
        ratio: share of the convolution in the mix; next to 0, nothing is convolved.
        shared: 0: `scales` convolutions, 1: one, n: n of them shared by scales.
    """

    def make(count: int) -> list[nn.Module]:
        none = abs(ratio) <= 1e-6
        return [nn.Identity() if none else Phi(channels, ratio) for _ in range(count)]

    if shared == 0:
        return PhiNonShared(make(scales))
    if shared == 1:
        return PhiShared(*make(1))
    return PhiPartiallyShared(nn.ModuleList(make(shared)))


#: Entries of a matrix that resizes, at most: beyond, torch's own operator is the faster one.
_MATRIX_LIMIT = 1 << 16


@functools.lru_cache(maxsize=256)
def _resizing_matrix(
    size: tuple[int, int], to: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Bicubic weights [h * w, H * W] of each pixel in each of the result."""
    with torch.inference_mode(False), torch.no_grad():
        points = torch.eye(size[0] * size[1], dtype=dtype, device=device).unflatten(1, (1, *size))
        return F.interpolate(points, to, mode="bicubic", align_corners=False).flatten(1)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bicubic without antialiasing (align_corners False) of maps [B, C, h, w]; the maps themselves
    where they have the size.

    Small maps are resized by a matrix product, whose backward pass is one too: several times as
    fast as torch's operator, and without its atomic additions on CUDA.
    """
    own, to = (maps.shape[2], maps.shape[3]), (size[0], size[1])
    if own == to:
        return maps
    entries = own[0] * own[1] * to[0] * to[1]
    plain = type(maps) is Tensor and not torch.compiler.is_compiling()  # a matrix may be kept
    if plain and entries <= _MATRIX_LIMIT and maps.dtype in (torch.float32, torch.float64):
        matrix = _resizing_matrix(own, to, maps.dtype, maps.device)
        rows = maps.reshape(-1, own[0] * own[1]) @ matrix
        return rows.view(*maps.shape[:2], *to)
    return F.interpolate(maps, to, mode="bicubic", align_corners=False)


def code_map(indices: Tensor, codebook: Tensor, size: Size) -> Tensor:
    """Codes `[B, D, *size]` of a scale's tokens [B, h * w], as they are stored."""
    return F.embedding(indices, codebook).unflatten(1, size).permute(0, 3, 1, 2)


def _pooled_rows(maps: Tensor, size: Size) -> Tensor:
    """Maps [B, D, H, W] averaged to a scale's grid: [B, h * w, D]."""
    return F.interpolate(maps, size, mode="area").flatten(2).mT


def residual_pass(
    f: Tensor,
    codebook: Tensor,
    sizes: Sequence[Size],
    phi: Callable[[int], nn.Module] | None,
    *,
    l2_norm: bool = False,
    dropped: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each scale's tokens [B, h * w] and what they add to f^, [B, D, H, W].

    Args:
        f: features [B, D, H, W] without gradient; what is yielded has that of `codebook` and `phi`.
        codebook: [K, D] in the dtype of f.
        phi: the convolution of scale number i; None is none at any scale.
        l2_norm: search by cosine; codes are added as they are either way.
        dropped: number of the scale whose tokens are -1 and add nothing, on f's device, or -1.
    """
    codes = codebook.detach()
    fused = phi is None and not l2_norm and dropped is None
    if fused:  # the pyramid as the kernel knows it
        found = ops.multiscale_quantize(f, codes, [f.shape[1]], sizes, l2_norm=False)
        tokens = found.indices.split([height * width for height, width in sizes], dim=1)
    rest = f
    for scale, size in enumerate(sizes):
        if fused:
            index = tokens[scale]
        else:
            rows = _pooled_rows(rest, size).flatten(0, 1).contiguous()
            index = ops.nearest_code(rows, codes, l2_norm=l2_norm).view(len(f), -1)
        h = resize(code_map(index, codebook, size), f.shape[2:])
        if phi is not None:
            h = phi(scale)(h)
        if dropped is not None:
            kept = dropped != scale
            h, index = h * kept, torch.where(kept, index, -1)
        rest = rest - h.detach()
        yield index, h


class VarQuantizer(MultiScaleQuantizer):
    """VAR's quantizer behind the interface of `MultiScaleQuantizer`.

    It differs from TokenFlow's in this: one codebook group; a convolution on every scale's
    upsampled codes; losses of f^ so far against the features, where TokenFlow's compares a
    scale's codes with what that scale searched with; codes are added as they are stored, also
    where they are found by cosine. A scale's error is therefore mean((f^_s - h)^2).

    Args:
        codebook_size, scales, beta, usage_decay, scale_drop: as for `MultiScaleQuantizer`.
        dim: channels of the features.
        l2_norm: search by cosine (VAR's `using_znorm`).
        phi_ratio: share of the convolution in the mix.
        phi_shared: 0: a convolution for each scale, 1: one, n: n of them shared by scales.

    Raises:
        ValueError, TypeError: an argument out of its range, named in the message.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        scales: Sequence[int | Size] = (1, 2, 4, 6, 8, 10, 12, 14),
        *,
        beta: float = 0.25,
        l2_norm: bool = False,
        usage_decay: float = 0.99,
        scale_drop: float = 0.0,
        phi_ratio: float = 0.5,
        phi_shared: int = 4,
    ) -> None:
        super().__init__(
            codebook_size,
            (dim,),
            scales,
            beta=beta,
            l2_norm=l2_norm,
            usage_decay=usage_decay,
            scale_drop=scale_drop,
        )
        if not 0 <= phi_ratio <= 1:
            raise ValueError(f"phi_ratio must be in [0, 1], got {phi_ratio}")
        # A convolution that no scale is nearest to would never train.
        if not 0 <= phi_shared <= len(self.scales):
            raise ValueError(
                f"phi_shared must be 0 to {len(self.scales)}, the number of scales, "
                f"got {phi_shared}"
            )
        self.phis = make_phis(dim, phi_ratio, phi_shared, len(self.scales))

    def _phi(self, scale: int) -> nn.Module:
        return self.phis[scale / max(1, len(self.scales) - 1)]

    def _normalize(self, rows: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        return rows

    def _quantize(
        self, features: Tensor, codebook: Tensor, dropped: Tensor | None = None
    ) -> ops.QuantizeResult:
        target = features.detach()
        f_hat = torch.zeros_like(target)
        indices, code_error, row_error = [], [], []
        with torch.autocast(features.device.type, enabled=False):
            scales = residual_pass(
                target, codebook, self.scales, self._phi, l2_norm=self.l2_norm, dropped=dropped
            )
            for scale, (index, h) in enumerate(scales):
                indices.append(index)
                f_hat = f_hat + h
                present = 1 if dropped is None else dropped != scale
                error = F.mse_loss(f_hat, target) * present
                code_error.append(error)
                if torch.is_grad_enabled() and features.requires_grad:
                    error = F.mse_loss(f_hat.detach(), features) * present
                row_error.append(error.detach() if error is code_error[-1] else error)
        tokens = torch.cat(indices, dim=1)
        return ops.QuantizeResult(
            features + (f_hat.detach() - target),
            tokens,
            torch.stack(code_error),
            torch.stack(row_error),
            ops.count_codes(tokens, self.codebook_size),
        )

    def _contribution(self, tokens: Tensor, codebook: Tensor, scale: int, size: Size) -> Tensor:
        """What a scale's tokens [B, h * w] add to f^, [B, D, *size]."""
        return self._at_size(F.embedding(tokens, codebook), scale, size)

    def _sum_codes(self, indices: Tensor, codebook: Tensor, upto: int, size: Size) -> Tensor:
        total = codebook.new_zeros(())
        for scale, tokens in enumerate(indices.split(self.tokens_per_scale[:upto], dim=1)):
            total = total + self._contribution(tokens, codebook, scale, size)
        return total

    def _rows(self, features: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
        rows, rest = [], features
        for scale, tokens in enumerate(indices.split(self.tokens_per_scale, dim=1)):
            rows.append(_pooled_rows(rest, self.scales[scale]))
            size = features.shape[2], features.shape[3]
            rest = rest - self._contribution(tokens, codebook, scale, size)
        return torch.cat(rows, dim=1)

    # f^ is carried at the size of the last scale; each scale sees its means (algorithm 2).

    @torch.no_grad()
    def accumulate(self, f_hat: Tensor | None, indices: Tensor, scale: int) -> Tensor:
        """f^ with one more scale, at the size of the last scale: [B, D, H, W].

        The scale's codes are upsampled, pass the scale's convolution and are added. What the next
        scale sees of f^ is `scale_input`.

        Args:
            f_hat: what the last call returned, [B, D, H, W]; None for scale 0.
            indices: this scale's tokens [B, h * w], or rows in the place of their codes, floating
                point [B, h * w, D].
            scale: which scale, from 0.

        Raises:
            ValueError: `scale` out of range, or a shape that does not fit it.
        """
        return super().accumulate(f_hat, indices, scale)

    def _carried_size(self, scale: int) -> Size:
        return self.scales[-1]

    def _codes_to_add(self, indices: Tensor) -> Tensor:
        wide = self.codebooks[0].dtype == torch.float64
        return F.embedding(indices, self.joint_codebook(torch.float64 if wide else torch.float32))

    def _at_size(self, rows: Tensor, scale: int, size: Size) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            maps = rows.unflatten(1, self.scales[scale]).permute(0, 3, 1, 2)
            return self._phi(scale)(resize(maps, size))

    def _carry(self, f_hat: Tensor, scale: int) -> Tensor:
        return f_hat

    def _view(self, f_hat: Tensor, scale: int) -> Tensor:
        return F.interpolate(f_hat, self.scales[scale], mode="area")


__getattr__ = renamed(__name__, {"walk": "residual_pass"})
