"""Stands in for `VectorQuantizer` of TokenFlow's release: two codebooks behind one index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.compat._common import NEEDS_DISTANCES, computable, refuse
from tokenflow_ext.ops import Size

USAGE_WINDOW = 131072  # length of the release's `codebook_used` buffer


class VectorQuantizer(nn.Module):
    """TokenFlow's quantizer (arXiv 2412.03069, section 3.1) as released, on the fused kernels.

    `forward` quantizes one map, as the release does inside its loop over scales. `encode_scales` is
    that whole loop in one call of the fused kernel, `decode_scales` the way back.

    Args:
        n_e: codes K.
        e_dim: channels of both codebooks together.
        beta: factor of the commitment loss.
        entropy_loss_ratio: 0; anything else is refused.
        l2_norm: scale features and codes to unit length in each codebook.
        show_usage: keep the last 131,072 indices of training and report the share of codes in them.
        split: channels of the semantic and of the pixel codebook.
        kmeans: False; the release's EMA variant is refused.

    Raises:
        NotImplementedError: an option that is not served.
        ValueError: `split` does not hold two widths that sum to `e_dim`.
    """

    codebook_used: Tensor

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
        super().__init__()
        refuse("VectorQuantizer", NEEDS_DISTANCES, entropy_loss_ratio=entropy_loss_ratio)
        refuse(
            "VectorQuantizer",
            "use MultiScaleQuantizer with codebook_update='ema' and init_kmeans",
            kmeans=kmeans,
        )
        if len(split) != 2 or sum(split) != e_dim or min(split) < 1:
            raise ValueError(f"split must hold two widths that sum to e_dim={e_dim}, got {split}")
        if n_e < 1:
            raise ValueError(f"n_e must be at least 1, got {n_e}")
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.l2_norm = l2_norm
        self.show_usage = show_usage
        self.split = list(split)
        self.kmeans_init = kmeans
        self.embedding_vqkd = nn.Embedding(n_e, split[0])
        self.embedding_vqgan = nn.Embedding(n_e, split[1])
        with torch.no_grad():
            for embedding in (self.embedding_vqkd, self.embedding_vqgan):
                embedding.weight.uniform_(-1 / n_e, 1 / n_e)
                if l2_norm:
                    embedding.weight.copy_(F.normalize(embedding.weight, dim=-1))
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))

    def forward(self, z: Tensor) -> tuple[Tensor, tuple, tuple]:
        """Quantizes one map.

        Args:
            z: [B, e_dim, H, W].

        Returns:
            z_q: [B, e_dim, H, W], with the straight-through gradient.
            losses: (vq_loss, commit_loss, entropy_loss, codebook_usage, vqkd_d_norm, vqgan_d_norm);
                the first three are None outside training, the last two are the means over rows of
                the sums over codes of the squared distances' squares, without gradient.
            info: (None, None, indices [B * H * W]).
        """
        z_q, losses, indices = self.encode_scales(z, [tuple(z.shape[2:])])
        return z_q, tuple(losses), (None, None, indices.flatten())

    def encode_scales(
        self, h: Tensor, scales: Sequence[int | Size]
    ) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """The loop over scales of `TokenFlow.encode`, in one call.

        Args:
            h: [B, e_dim, H, W].
            scales: side or (height, width) of each scale to take part, coarse to fine.

        Returns:
            What `TokenFlow.encode` returns: (f^ [B, e_dim, H, W], the means over scales of
            `forward`'s losses, indices [B, L] scale after scale).
        """
        if h.dim() != 4 or h.shape[1] != self.e_dim or h.numel() == 0:
            raise ValueError(
                f"h must have shape [B, {self.e_dim}, H, W] with no side of 0, got {tuple(h.shape)}"
            )
        sizes = ops.as_sizes(scales)
        features, codebook = computable(h), self._codebook().to(computable(h).dtype)
        out = ops.multiscale_quantize(features, codebook, self.split, sizes, l2_norm=self.l2_norm)
        vq_loss = commit_loss = entropy_loss = None
        usage: Tensor | float = 0
        tokens = [height * width for height, width in sizes]
        if self.training:
            vq_loss = out.code_error.mean()
            commit_loss = self.beta * out.row_error.mean()
            entropy_loss = torch.zeros_like(vq_loss)
            if self.show_usage:
                shares = [self._record(part) for part in out.indices.split(tokens, dim=1)]
                usage = torch.stack(shares).mean()
        with torch.no_grad():
            rows = ops.multiscale_rows(
                features, codebook, out.indices, self.split, sizes, self.l2_norm
            )
            groups = zip(rows.split(self.split, -1), codebook.split(self.split, -1), strict=True)
            norms = [
                _mean_of_scales(_distance_norms(part, self._normalize(codes)), tokens)
                for part, codes in groups
            ]
        losses = [vq_loss, commit_loss, entropy_loss, usage, *norms]
        return out.quantized.to(h.dtype), losses, out.indices

    @torch.no_grad()
    def decode_scales(
        self, indices: Tensor, scales: Sequence[int | Size], size: Size | None = None
    ) -> Tensor:
        """f^ [B, e_dim, *size] of indices [B, L]; `size` is the last scale's by default."""
        sizes = ops.as_sizes(scales)
        codebook = computable(self._codebook())
        return ops.multiscale_decode(
            indices, codebook, self.split, sizes, size or sizes[-1], self.l2_norm
        )

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
        embeddings = (self.embedding_vqkd, self.embedding_vqgan)
        return self.get_codebook_entry_outside(indices, embeddings, shape, channel_first)

    def get_codebook_entry_outside(
        self,
        indices: Tensor,
        outside_embedding: Sequence[nn.Embedding],
        shape: Sequence[int] | None = None,
        channel_first: bool = True,
    ) -> Tensor:
        """As `get_codebook_entry`, from a (semantic, pixel) pair of other embeddings."""
        z_q = torch.cat([self._normalize(part(indices)) for part in outside_embedding], dim=-1)
        if shape is None:
            return z_q
        if channel_first:
            batch, channels, height, width = shape
            return z_q.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return z_q.reshape(*shape)

    def _codebook(self) -> Tensor:
        return torch.cat([self.embedding_vqkd.weight, self.embedding_vqgan.weight], dim=1)

    def _normalize(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    @torch.no_grad()
    def _record(self, indices: Tensor) -> Tensor:
        """Pushes indices into the window; the share of codes in it."""
        window = torch.cat([self.codebook_used, indices.flatten().to(self.codebook_used)])
        self.codebook_used.copy_(window[-USAGE_WINDOW:])
        used = torch.zeros(self.n_e, device=indices.device)
        return used.index_fill_(0, self.codebook_used.long(), 1).mean()


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
