"""Stands in for `VectorQuantizer` of LlamaGen (tokenizer/tokenizer_image/vq_model.py)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from tokenflow_ext.ops import Size

from ._lookup import LookupQuantizer


class VectorQuantizer(LookupQuantizer):
    """LlamaGen's quantizer (arXiv 2406.06525, section 2.1) on the fused search.

    Args:
        n_e: codes K.
        e_dim: channels.
        beta: factor of the commitment loss.
        entropy_loss_ratio: factor of the entropy loss, which is computed a few rows at a time.
        l2_norm: scale features and codes to unit length.
        show_usage: keep the last 65,536 indices of training and report the share of codes in them.

    Raises:
        ValueError: `n_e` or `e_dim` below 1.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        entropy_loss_ratio: float,
        l2_norm: bool,
        show_usage: bool,
    ) -> None:
        super().__init__(
            n_e, beta, entropy_loss_ratio, l2_norm, show_usage, 65536, {"embedding": e_dim}
        )

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
        """Quantizes a map of any size.

        Args:
            z: [B, e_dim, H, W].

        Returns:
            Three parts, as theirs.

            - z_q: [B, e_dim, H, W], with the straight-through gradient.
            - losses: (vq_loss, commit_loss, entropy_loss, codebook_usage); the first three are None
              outside training.
            - info: (None, None, `indices [B * H * W]`).
        """
        z_q, losses, indices, _ = self._encode(z, [cast(Size, tuple(z.shape[2:]))])
        return z_q, tuple(losses), (None, None, indices.flatten())
