"""Stands in for `VectorQuantizer` of TokenFlow's release: two codebooks behind one index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.ops import Size

from ._common import computable, raise_unsupported, shown
from ._lookup import LookupQuantizer

USAGE_WINDOW = 131072  # length of the release's `codebook_used` buffer


class VectorQuantizer(LookupQuantizer):
    """TokenFlow's quantizer (arXiv 2412.03069, section 3.1) as released, on the fused kernels.

    `forward` quantizes one map, as the release does inside its loop over scales. `encode_scales` is
    that whole loop in one call of the fused kernel, `decode_scales` the way back.

    Args:
        n_e: codes K.
        e_dim: channels of both codebooks together.
        beta: factor of the commitment loss.
        entropy_loss_ratio: factor of the entropy loss, which `forward` computes a few rows at a
            time and `encode_scales` does not support.
        l2_norm: scale features and codes to unit length in each codebook.
        show_usage: keep the last 131,072 indices of training and report the share of codes in them.
        split: channels of the semantic and of the pixel codebook.
        kmeans: False; the release's EMA variant is not supported.

    Raises:
        NotImplementedError: an option that is not supported.
        ValueError: `split` does not hold two widths that sum to `e_dim`.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        entropy_loss_ratio: float,
        l2_norm: bool,
        show_usage: bool,
        split: Sequence[int],
        kmeans: bool = False,
    ) -> None:
        raise_unsupported(
            "VectorQuantizer",
            "use MultiScaleQuantizer with codebook_update='ema' and init_kmeans",
            kmeans=kmeans,
        )
        if len(split) != 2 or sum(split) != e_dim or min(split) < 1:
            raise ValueError(
                f"split must hold two widths that sum to e_dim={e_dim}, got {shown(split)}"
            )
        widths = {"embedding_vqkd": split[0], "embedding_vqgan": split[1]}
        super().__init__(n_e, beta, entropy_loss_ratio, l2_norm, show_usage, USAGE_WINDOW, widths)
        self.kmeans_init = kmeans

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
        """Quantizes one map.

        Args:
            z: [B, e_dim, H, W].

        Returns:
            Three parts, as theirs.

            - z_q: [B, e_dim, H, W], with the straight-through gradient.
            - losses: (vq_loss, commit_loss, entropy_loss, codebook_usage, vqkd_d_norm,
              vqgan_d_norm); the first three are None outside training, the last two are the means
              over rows of the sums over codes of the squared distances' squares, without gradient.
            - info: (None, None, `indices [B * H * W]`).
        """
        z_q, losses, indices = self.encode_scales(z, [cast(Size, tuple(z.shape[2:]))])
        return z_q, tuple(losses), (None, None, indices.flatten())

    def encode_scales(
        self, h: Tensor, scales: Sequence[int | Size]
    ) -> tuple[Tensor, list[Tensor | float | None], Tensor]:
        """The loop over scales of `TokenFlow.encode`, in one call.

        Args:
            h: [B, e_dim, H, W].
            scales: side or (height, width) of each scale to take part, coarse to fine.

        Returns:
            What `TokenFlow.encode` returns: (f^ [B, e_dim, H, W], the means over scales of
            `forward`'s losses, indices [B, L] scale after scale).

        Raises:
            NotImplementedError: in training, an `entropy_loss_ratio` and scales of other sizes
                than that of h.
        """
        sizes = ops.as_sizes(scales)
        quantized, losses, indices, rows = self._encode(h, sizes)
        tokens = [height * width for height, width in sizes]
        with torch.no_grad():
            codes = self._groups(self._codebook().to(rows.dtype))
            norms = [
                _mean_of_scales(_distance_norms(*group), tokens)
                for group in zip(rows.split(self.split, dim=-1), codes, strict=True)
            ]
        return quantized, [*losses, *norms], indices

    @torch.no_grad()
    def decode_scales(
        self, indices: Tensor, scales: Sequence[int | Size], size: Size | None = None
    ) -> Tensor:
        """`f^ [B, e_dim, *size]` of indices [B, L]; `size` is the last scale's by default."""
        sizes = ops.as_sizes(scales)
        codebook = computable(self._codebook())
        return ops.multiscale_decode(
            indices, codebook, self.split, sizes, size or sizes[-1], self.l2_norm
        )

    def get_codebook_entry_outside(
        self,
        indices: Tensor,
        outside_embedding: Sequence[nn.Embedding],
        shape: Sequence[int] | None = None,
        channel_first: bool = True,
    ) -> Tensor:
        """As `get_codebook_entry`, from a (semantic, pixel) pair of other embeddings."""
        return self._entry(indices, outside_embedding, shape, channel_first)


def _mean_of_scales(values: Tensor, tokens: list[int]) -> Tensor:
    """Mean over scales of the means of values [B, L] in each."""
    return torch.stack([part.mean() for part in values.split(tokens, dim=1)]).mean()


def _distance_norms(rows: Tensor, codes: Tensor) -> Tensor:
    """Sum over codes [K, D] of |row - code|^4 for rows [..., D]: [...].

    From moments of the codes, so that no row meets a code: with n_k = |code_k|^2 and s = |row|^2,
    sum_k (s + n_k - 2 row.code_k)^2 is a quadratic form of the row.
    """
    n = codes.square().sum(dim=-1)
    s = rows.square().sum(dim=-1)
    quadratic = ((rows @ (codes.T @ codes)) * rows).sum(dim=-1)
    linear = rows @ (n @ codes) + s * (rows @ codes.sum(dim=0))
    total = len(codes) * s.square() + 2 * s * n.sum() + n.square().sum()
    return total + 4 * quadratic - 4 * linear
