"""What LlamaGen's quantizer and TokenFlow's, made from it, share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.ops import Size
from tokenflow_ext.soft_entropy import entropy_loss

from ._common import computable, raise_unsupported


class LookupQuantizer(nn.Module):
    """Embeddings behind one index, their losses, and a window of used codes.

    Args:
        n_e: codes K.
        beta: factor of the commitment loss.
        entropy_loss_ratio: factor of the entropy loss.
        l2_norm: scale features and codes to unit length in each embedding.
        show_usage: keep the last indices of training and report the share of codes in them.
        window: how many indices are kept.
        widths: name and channels of each embedding.

    Attributes:
        skipped_rows: how many rows the window has left out because they were not finite, int64.
    """

    codebook_used: Tensor
    skipped_rows: Tensor

    def __init__(
        self,
        n_e: int,
        beta: float,
        entropy_loss_ratio: float,
        l2_norm: bool,
        show_usage: bool,
        window: int,
        widths: dict[str, int],
    ) -> None:
        super().__init__()
        for name, value in (("n_e", n_e), ("e_dim", sum(widths.values()))):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.n_e = n_e
        self.e_dim = sum(widths.values())
        self.beta = beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.l2_norm = l2_norm
        self.show_usage = show_usage
        self.split = list(widths.values())
        self._names = list(widths)
        for name, width in widths.items():
            self.add_module(name, nn.Embedding(n_e, width))
        if show_usage:
            self.register_buffer("codebook_used", torch.empty(window))
        self.register_buffer("skipped_rows", torch.empty((), dtype=torch.int64), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codes uniform in [-1/K, 1/K], of unit length with l2_norm; statistics zero."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        for part in self._embeddings():
            codes = part.weight
            codes.uniform_(-1 / self.n_e, 1 / self.n_e)
            if self.l2_norm:
                codes.copy_(F.normalize(codes, dim=-1))

    def get_codebook_entry(
        self,
        indices: Tensor,
        shape: Sequence[int] | None = None,
        channel_first: bool = True,
    ) -> Tensor:
        """Codes [..., e_dim] of indices [...], or in `shape`.

        Args:
            indices: int32 or int64.
            shape: (B, C, H, W) of the result, or with channel_first=False (B, H, W, C).
            channel_first: which of the two `shape` is.
        """
        return self._entry(indices, self._embeddings(), shape, channel_first)

    def _entry(
        self,
        indices: Tensor,
        embeddings: Sequence[nn.Embedding],
        shape: Sequence[int] | None,
        channel_first: bool,
    ) -> Tensor:
        z_q = torch.cat([self._normalize(part(indices)) for part in embeddings], dim=-1)
        if shape is None:
            return z_q
        if channel_first:
            batch, channels, height, width = shape
            return z_q.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return z_q.reshape(*shape)

    def _embeddings(self) -> list[nn.Embedding]:
        return [cast(nn.Embedding, self.get_submodule(name)) for name in self._names]

    def _codebook(self) -> Tensor:
        return torch.cat([part.weight for part in self._embeddings()], dim=1)

    def _normalize(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    def _groups(self, rows: Tensor) -> list[Tensor]:
        """Rows [..., e_dim] as each embedding's distance takes them."""
        return [self._normalize(part) for part in rows.split(self.split, dim=-1)]

    def _encode(
        self, h: Tensor, sizes: list[Size]
    ) -> tuple[Tensor, list[Tensor | float | None], Tensor, Tensor]:
        """A loop over scales, in one call.

        Args:
            h: [B, e_dim, H, W].
            sizes: (height, width) of each scale, coarse to fine.

        Returns:
            f^ [B, e_dim, H, W] with the straight-through gradient, the losses as means over scales
            (vq, commitment, entropy, usage; the first three None outside training), indices
            [B, L] scale after scale, and what was searched with, [B, L, e_dim], without gradient.
        """
        if h.dim() != 4 or h.shape[1] != self.e_dim or h.numel() == 0:
            raise ValueError(
                f"h must have shape [B, {self.e_dim}, H, W] with no side of 0, got {tuple(h.shape)}"
            )
        features, codebook = computable(h), self._codebook().to(computable(h).dtype)
        out = ops.multiscale_quantize(features, codebook, self.split, sizes, l2_norm=self.l2_norm)
        rows = ops.multiscale_rows(features, codebook, out.indices, self.split, sizes, self.l2_norm)
        losses: list[Tensor | float | None] = [None, None, None, 0]
        if self.training:
            losses[0] = out.code_error.mean()
            losses[1] = self.beta * out.row_error.mean()
            losses[2] = self._entropy_loss(features, codebook, sizes)
            if self.show_usage:
                tokens = [height * width for height, width in sizes]
                finite = rows.isfinite().all(dim=-1).split(tokens, dim=1)
                parts = zip(out.indices.split(tokens, dim=1), finite, strict=True)
                losses[3] = torch.stack([self._record(*part) for part in parts]).mean()
        return out.quantized.to(h.dtype), losses, out.indices, rows

    def _entropy_loss(self, features: Tensor, codebook: Tensor, sizes: list[Size]) -> Tensor:
        if not self.entropy_loss_ratio:
            return codebook.new_zeros(())
        if sizes != [tuple(features.shape[2:])]:
            raise_unsupported(
                type(self).__name__,
                "the scales of one call are searched together; call forward for each scale",
                entropy_loss_ratio=self.entropy_loss_ratio,
            )
        rows = torch.cat(self._groups(features.permute(0, 2, 3, 1).flatten(0, 2)), dim=1)
        codes = torch.cat(self._groups(codebook), dim=1)
        return self.entropy_loss_ratio * entropy_loss(rows, codes)

    @torch.no_grad()
    def _record(self, indices: Tensor, finite: Tensor) -> Tensor:
        """Pushes the indices of finite rows into the window; the share of codes in it."""
        size, kept = len(self.codebook_used), finite.sum()
        last = (~finite.flatten()).to(torch.uint8).argsort(stable=True)
        window = torch.cat([self.codebook_used, indices.flatten()[last].to(self.codebook_used)])
        self.codebook_used.copy_(window[kept + torch.arange(size, device=window.device)])
        self.skipped_rows.add_(finite.numel() - kept)
        used = torch.zeros(self.n_e, device=indices.device)
        return used.index_fill_(0, self.codebook_used.long(), 1).mean()
