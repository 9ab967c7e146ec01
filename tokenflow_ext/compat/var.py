"""Stands in for `VectorQuantizer2` of VAR: a residual pyramid with convolutions between scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.codebook import reduce_counts, update_running
from tokenflow_ext.collectives import world_size
from tokenflow_ext.ops import Size
from tokenflow_ext.var import (
    PhiNonShared,
    PhiPartiallyShared,
    PhiShared,
    code_map,
    make_phis,
    residual_pass,
    resize,
)

from ._common import computable


class VectorQuantizer2(nn.Module):
    """VAR's quantizer (arXiv 2404.02905, algorithms 1 and 2) on the fused search.

    Args:
        vocab_size: codes K.
        Cvae: channels.
        using_znorm: search by cosine; codes are added as they are either way.
        beta: factor of the loss that moves the features.
        default_qresi_counts: how many convolutions with share_quant_resi=0; one a scale by default.
        v_patch_nums: side of each scale, coarse to fine; the last is that of the features.
        quant_resi: share of the convolution, 0 for none.
        share_quant_resi: 0: a convolution for each scale, 1: one, n: n of them shared by scales.

    Attributes:
        skipped_rows: how many rows the running hits have left out so far because their image's
            features were not finite, over all processes; int64.

    Raises:
        ValueError: an argument out of its range.
    """

    ema_vocab_hit_SV: Tensor
    skipped_rows: Tensor

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] | None = None,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        super().__init__()
        if not v_patch_nums or min(v_patch_nums) < 1:
            raise ValueError(f"v_patch_nums must hold one or more sides, got {v_patch_nums}")
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        if share_quant_resi < 0:
            raise ValueError(f"share_quant_resi must be at least 0, got {share_quant_resi}")
        self.vocab_size = vocab_size
        self.Cvae = Cvae
        self.using_znorm = using_znorm
        self.beta = beta
        self.v_patch_nums = tuple(v_patch_nums)
        self.quant_resi_ratio = quant_resi
        self.has_phi = abs(quant_resi) > 1e-6

        self.quant_resi: PhiShared | PhiPartiallyShared | PhiNonShared = make_phis(
            Cvae, quant_resi, share_quant_resi, default_qresi_counts or len(self.v_patch_nums)
        )
        self.register_buffer("ema_vocab_hit_SV", torch.empty(len(self.v_patch_nums), vocab_size))
        self.register_buffer("skipped_rows", torch.empty((), dtype=torch.int64), persistent=False)
        self.reset_parameters()
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.prog_si = -1  # last scale to encode; -1 for all of them

    def reset_parameters(self) -> None:
        """All statistics zero; the codes and the convolutions reset themselves."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        self.record_hit = 0

    def eini(self, eini: float) -> None:
        """Initialises the codes: normal of deviation eini > 0, or uniform in `+-|eini| / K`."""
        with torch.no_grad():
            if eini > 0:
                nn.init.trunc_normal_(self.embedding.weight, std=eini)
            elif eini < 0:
                self.embedding.weight.uniform_(eini / self.vocab_size, -eini / self.vocab_size)

    def extra_repr(self) -> str:
        return (
            f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}  |  "
            f"S={len(self.v_patch_nums)}, quant_resi={self.quant_resi_ratio}"
        )

    # ------------------------------------------------------------------ training of the tokenizer

    def forward(
        self, f_BChw: Tensor, ret_usages: bool = False
    ) -> tuple[Tensor, list[float] | None, Tensor]:
        """Quantizes features.

        Args:
            f_BChw: [B, C, H, W], H = W = the last scale's side.
            ret_usages: also return, by scale, the share of codes whose running hits pass VAR's
                margin, in percent (waits for the device).

        Returns:
            (f^ [B, C, H, W] with the straight-through gradient, usages or None, vq loss).
        """
        f = computable(f_BChw)
        sizes = self._sizes(f, None)
        target = f.detach()
        f_hat = torch.zeros_like(target)
        loss = target.new_zeros(())
        indices = []
        with torch.autocast(f.device.type, enabled=False):
            for index, h in self._scales(target, sizes):
                indices.append(index)
                f_hat = f_hat + h
                loss = loss + self.beta * F.mse_loss(f_hat.detach(), f)
                loss = loss + F.mse_loss(f_hat, target)
            if self.training:
                self._record_hits(target, indices)
            straight_through = f + (f_hat.detach() - target)
        usages = self._usages(f) if ret_usages else None
        return straight_through, usages, loss / len(sizes)

    @torch.no_grad()
    def _record_hits(self, f: Tensor, indices: list[Tensor]) -> None:
        """Running hits of each scale, over all processes: one reduction a step.

        Images whose features hold a NaN or an infinity are left out, and counted.
        """
        finite = f.isfinite().flatten(1).all(dim=1, keepdim=True)
        tokens = torch.cat(
            [index + scale * self.vocab_size for scale, index in enumerate(indices)], dim=1
        )
        tokens = torch.where(finite, tokens, -1)
        hits, skipped = reduce_counts(
            ops.count_codes(tokens, self.ema_vocab_hit_SV.numel()), (tokens < 0).sum()
        )
        self.skipped_rows.add_(skipped)
        hits = hits.view(self.ema_vocab_hit_SV.shape)
        momentum = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
        update_running(self.ema_vocab_hit_SV, None, hits, None, 1 - momentum)
        self.record_hit += 1

    def _usages(self, f: Tensor) -> list[float]:
        margin = world_size() * (f.numel() / f.shape[1]) / self.vocab_size * 0.08
        return [100 * share for share in (self.ema_vocab_hit_SV >= margin).float().mean(1).tolist()]

    # ------------------------------------------------------------------ tokens

    @torch.no_grad()
    def f_to_idxBl_or_fhat(
        self,
        f_BChw: Tensor,
        to_fhat: bool,
        v_patch_nums: Sequence[int | Size] | None = None,
    ) -> list[Tensor]:
        """By scale, the tokens [B, l] of features, or f^ [B, C, H, W] up to it.

        Args:
            f_BChw: [B, C, H, W].
            to_fhat: f^ rather than tokens.
            v_patch_nums: other scales than the constructor's; the last has to be (H, W).
        """
        f = computable(f_BChw.detach())
        sizes = self._sizes(f, v_patch_nums)
        kept = sizes if self.prog_si < 0 else sizes[: self.prog_si + 1]
        out: list[Tensor] = []
        f_hat = torch.zeros_like(f)
        for index, h in self._scales(f, kept, total=len(sizes)):
            f_hat = f_hat + h
            out.append(f_hat if to_fhat else index)
        return out

    @torch.no_grad()
    def embed_to_fhat(
        self, ms_h_BChw: list[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """f^ from codes by scale, [B, C, s, s] each: up to each scale, or the last alone.

        With all_to_max_scale=False, f^ grows with the scales and each scale's convolution runs at
        its own size (VAR keeps it for experiments).
        """
        total = len(self.v_patch_nums)
        side = self.v_patch_nums[-1] if all_to_max_scale else self.v_patch_nums[0]
        f_hat = computable(ms_h_BChw[0]).new_zeros(len(ms_h_BChw[0]), self.Cvae, side, side)
        out = []
        for scale, (patches, codes) in enumerate(zip(self.v_patch_nums, ms_h_BChw, strict=True)):
            size = f_hat.shape[2:] if all_to_max_scale else (patches, patches)
            f_hat = resize(f_hat, size) + self._phi(scale, total)(resize(codes, size))
            out.append(f_hat)
        return out[-1] if last_one else out

    # ------------------------------------------------------------------ inputs of the transformer

    @torch.no_grad()
    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[Tensor]) -> Tensor | None:
        """Teacher-forced inputs of scales 2 to S, [B, L - l_1, C], from tokens [B, l] by scale."""
        total = len(self.v_patch_nums)
        side = self.v_patch_nums[-1]
        f_hat = computable(self.embedding.weight).new_zeros(())
        inputs = []
        for scale in range(total - 1 if self.prog_si < 0 else min(total - 1, self.prog_si)):
            patches, following = self.v_patch_nums[scale : scale + 2]
            codes = self._codes(gt_ms_idx_Bl[scale], (patches, patches))
            f_hat = f_hat + self._phi(scale, total)(resize(codes, (side, side)))
            following_map = F.interpolate(f_hat, (following, following), mode="area")
            inputs.append(following_map.flatten(2).mT)
        return torch.cat(inputs, dim=1) if inputs else None

    @torch.no_grad()
    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds scale si's codes [B, C, s, s] to f^ in place; (f^, the next scale's input)."""
        side = self.v_patch_nums[-1]
        f_hat.add_(self._phi(si, SN)(resize(h_BChw, (side, side))))
        if si == SN - 1:
            return f_hat, f_hat
        following = self.v_patch_nums[si + 1]
        return f_hat, F.interpolate(f_hat, (following, following), mode="area")

    # ------------------------------------------------------------------ the loop

    def _sizes(self, f: Tensor, scales: Sequence[int | Size] | None) -> list[Size]:
        scales = scales or self.v_patch_nums
        sizes = ops.as_sizes(scales)
        if f.dim() != 4 or f.shape[1] != self.Cvae or f.shape[0] == 0:
            raise ValueError(
                f"f_BChw must have shape [B, {self.Cvae}, H, W], B > 0, got {tuple(f.shape)}"
            )
        if tuple(f.shape[2:]) != sizes[-1]:
            raise ValueError(
                f"f_BChw must have the last scale's size {sizes[-1]}, got {tuple(f.shape[2:])}"
            )
        return sizes

    def _phi(self, scale: int, total: int) -> nn.Module:
        return self.quant_resi[scale / max(1, total - 1)]

    def _codes(self, indices: Tensor, size: Size) -> Tensor:
        return code_map(indices, computable(self.embedding.weight), size)

    def _scales(
        self, f: Tensor, sizes: list[Size], total: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each scale's tokens [B, l] and what they add to f^, [B, C, H, W].

        f has no gradient; what is yielded has that of codes and convolutions.
        """
        count = total or len(sizes)
        return residual_pass(
            f,
            self.embedding.weight.to(f.dtype),
            sizes,
            (lambda scale: self._phi(scale, count)) if self.has_phi else None,
            l2_norm=self.using_znorm,
        )
