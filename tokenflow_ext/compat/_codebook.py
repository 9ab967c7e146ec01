"""The codebook under the stand-ins for vector-quantize-pytorch, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tokenflow_ext import ops
from tokenflow_ext.codebook import (
    kmeans,
    reduce_counts,
    reset_running,
    smoothed_means,
    sum_by_code,
    update_running,
)
from tokenflow_ext.collectives import all_reduce, sample_rows
from tokenflow_ext.stochastic import sample_code

EPS = 1e-6
Weight = Tensor | Callable[[Tensor, Tensor], Tensor]


def unit(x: Tensor) -> Tensor:
    """Rows of x [..., D] at unit length."""
    return F.normalize(x, dim=-1, eps=EPS)


def rotate(x: Tensor, target: Tensor) -> Tensor:
    """The value of target; the gradient goes back to x by the rotation and scaling between them.

    arXiv 2410.06424, section 4.2: the rotation is two reflections, kept as their dot products.
    """
    x_norm, target_norm = (t.detach().norm(dim=-1, keepdim=True) for t in (x, target))
    u = x.detach() / x_norm.clamp(min=EPS)
    q = target.detach() / target_norm.clamp(min=EPS)
    w = unit(u + q)
    along_w, along_u = ((x * t).sum(dim=-1, keepdim=True) for t in (w, u))
    return (x - 2 * along_w * w + 2 * along_u * q) * (target_norm / x_norm.clamp(min=EPS))


def differentiated(x: Tensor) -> bool:
    """Whether something asks for the derivative by x, backward or forward."""
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    return forward_ad.unpack_dual(x).tangent is not None


def go_towards(x: Tensor, target: Tensor, variance: float = 5e-3) -> Tensor:
    """From x as far as target is, in nearly its direction; the distance has gradient to both.

    DiVeQ, figure 1 of https://openreview.net/forum?id=KRVnpTbx7R. The direction's noise has the
    variance that is given.
    """
    error = target - x
    direction = unit(error + variance**0.5 * torch.randn_like(error)).detach()
    return x + direction * error.norm(dim=-1, keepdim=True)


def draw_seed(device: torch.device) -> Tensor:
    """A random number of this process, scalar int64."""
    return torch.randint(0, 10_000, (), device=device)


def shared_seed(device: torch.device) -> int:
    """A random number that every process agrees on."""
    return int(all_reduce(draw_seed(device)))


def nearest(rows: Tensor, codes: Tensor, l2_norm: bool = False) -> Tensor:
    """Index [N] of the nearest of codes [K, D] for each of rows [N, D]; none for no rows.

    float64 is compared as such on the CPU and in float32 elsewhere.
    """
    if len(rows) == 0:
        return rows.new_empty(0, dtype=torch.int64)
    if not rows.is_cpu:
        rows, codes = rows.float(), codes.float()
    return ops.nearest_code(rows, codes, l2_norm=l2_norm)


def zeros_for_padding(decode: Callable[[Tensor], Tensor], indices: Tensor) -> Tensor:
    """decode(indices), codes [..., D] of indices [...], with zeros where an index is -1."""
    padding = indices == -1
    codes = decode(indices.masked_fill(padding, 0))
    return codes.masked_fill(padding.unsqueeze(-1), 0.0)


class Codebook(nn.Module):
    """H codebooks of K codes, the running statistics that move them, and the search.

    Rows are [H, N, D], indices [H, N]. Rows with a NaN or an infinity are left out of the
    statistics, and so are those whose index is -1.

    Attributes:
        embed: codes [H, K, D], a parameter where something learns them by gradient.
        embed_avg: running sums of the rows of each code, [H, K, D].
        cluster_size: running counts of them, [H, K].
        initted: whether k-means has run, where it is asked for.
        skipped_rows: how many rows were left out so far because they were not finite, over all
            processes; int64.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor
    skipped_rows: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int,
        kmeans_init: bool,
        kmeans_iters: int,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        ema_update: bool,
        manual_ema_update: bool,
        learnable: bool,
        use_cosine_sim: bool,
        stochastic: bool,
        sample_codebook_temp: float,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.kmeans_init = kmeans_init
        self.kmeans_iters = kmeans_iters
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        self.stochastic = stochastic
        self.sample_codebook_temp = sample_codebook_temp
        # With use_cosine_sim, whether codes may be of other lengths than 1, which then count.
        self.any_length = learnable
        embed = torch.empty(num_codebooks, codebook_size, dim)
        self.register_buffer("initted", torch.empty((), dtype=torch.bool))
        self.register_buffer("cluster_size", torch.empty(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", torch.empty_like(embed))
        self.register_buffer("skipped_rows", torch.empty((), dtype=torch.int64), persistent=False)
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_load_state_dict_post_hook(_see_lengths)
        self._pending: tuple[Tensor, Tensor] | None = None  # sums and counts not yet averaged in
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codes anew, zeros where k-means will set them; all statistics as at the start."""
        self.embed.zero_()
        if not self.kmeans_init:
            nn.init.kaiming_uniform_(self.embed)
            if self.use_cosine_sim:
                self.embed.copy_(unit(self.embed))
        self.embed_avg.copy_(self.embed)
        self.cluster_size.fill_(1)
        self.initted.fill_(not self.kmeans_init)
        self.skipped_rows.zero_()
        self._pending = None

    def forward(self, *_: Tensor) -> None:
        raise NotImplementedError(
            "Codebook.forward is not supported: its third result is the distance of every row to "
            "every code, which is never formed here; call the VectorQuantize around it"
        )

    @property
    def codes(self) -> Tensor:
        """[H, K, D] float32."""
        return self.embed.float()

    def search(self, rows: Tensor, temperature: float | None = None) -> Tensor:
        """Codes [H, N] of rows [H, N, D] float32: the nearest, or drawn by their closeness.

        Args:
            temperature: of the draw, in training and where codes are stochastic;
                `sample_codebook_temp` by default, 0 for the nearest.
        """
        temperature = self.sample_codebook_temp if temperature is None else temperature
        drawn = self.stochastic and self.training and temperature > 0
        if not drawn and not (self.use_cosine_sim and self.any_length):
            return _by_book(self._nearest, rows.detach(), self.codes.detach())

        def draw(rows: Tensor, codes: Tensor) -> Tensor:
            if len(rows) == 0:
                return rows.new_empty(0, dtype=torch.int64)
            return sample_code(
                rows,
                codes,
                l2_norm=False,
                metric="dot" if self.use_cosine_sim else "l2",
                temperature=temperature if drawn else 0.0,
                seed=None if drawn else 0,  # torch's generator is left alone
            )

        return _by_book(draw, rows.detach(), self.codes.detach())

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes [H, ..., D] float32 of indices [H, ...]."""
        return _by_book(F.embedding, indices, self.codes)

    def decode(self, indices: Tensor) -> Tensor:
        """Codes [H, ..., D] of indices [H, ...]; zeros where an index is -1."""
        return zeros_for_padding(self.lookup, indices).to(self.embed.dtype)

    def _nearest(self, rows: Tensor, codes: Tensor) -> Tensor:
        return nearest(rows, codes, self.use_cosine_sim)

    def _assign(self, rows: Tensor, finite: Tensor, codes: Tensor) -> Tensor:
        """The nearest of codes [K, D] for rows [N, D] that are finite, -1 for others."""
        return torch.where(finite, self._nearest(rows, codes), -1)

    @torch.no_grad()
    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> bool:
        """k-means on the first rows that come, of all processes, where it was asked for.

        Args:
            data: rows [H, N, D].
            mask: [H, N], False for rows to leave out, as many in each codebook.

        Returns:
            Whether it ran now. It waits for another step where no row is finite.
        """
        if not self.kmeans_init or self.initted:
            return False
        if mask is not None:
            data = data[mask].unflatten(0, (self.num_codebooks, -1))
        samples = [sample_rows(rows, self.codebook_size) for rows in data]
        if bool(torch.stack(samples).isnan().any()):
            return False
        for number, (rows, means) in enumerate(zip(data, samples, strict=True)):
            finite = rows.isfinite().all(dim=-1)
            self.skipped_rows.add_(all_reduce((~finite).sum()))
            means, counts = kmeans(
                rows,
                means,
                self.kmeans_iters,
                assign=partial(self._assign, rows, finite),
                normalize=unit if self.use_cosine_sim else lambda means: means,
            )
            everywhere = torch.ones_like(counts, dtype=torch.bool)
            reset_running(
                everywhere, means, counts, self.cluster_size[number], self.embed_avg[number]
            )
        self.update_ema()
        self.initted.fill_(True)
        return True

    @torch.no_grad()
    def update(
        self,
        rows: Tensor,
        indices: Tensor,
        *,
        ema_update: bool | None = None,
        weight: Weight | None = None,
        accumulate: bool = False,
        padded: bool = False,
        deferred: bool = False,
        counted: bool = False,
    ) -> None:
        """One step of the statistics, the codes and the dead codes.

        Args:
            rows: [H, N, D] float32.
            indices: their codes [H, N], -1 for rows to leave out.
            ema_update: whether codes are averaged in this step; as constructed by default.
            weight: factor of each code's step, [K] or [H, K], or a function of sums and counts.
            accumulate: keep the step's sums for the next one.
            padded: whether an index may be -1.
            deferred: leave codes for a later `update_ema` and `expire_codes_`.
            counted: rows that are not finite have been counted.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        if not ema_update and self.threshold_ema_dead_code <= 0:
            return
        self._track(rows, indices, weight, accumulate, counted)
        if accumulate or deferred:
            return
        if ema_update and not self.manual_ema_update:
            self.update_ema()
        self.expire_codes_(rows, indices >= 0 if padded else None)

    def _track(
        self,
        rows: Tensor,
        indices: Tensor,
        weight: Weight | None,
        accumulate: bool,
        counted: bool,
    ) -> None:
        """Adds rows to the running statistics of their codes."""
        finite = rows.isfinite().all(dim=-1)
        first = self.codebook_size * torch.arange(self.num_codebooks, device=rows.device)
        flat = torch.where(finite & (indices >= 0), indices + first.unsqueeze(1), -1).flatten()
        sums, counts = sum_by_code(rows.flatten(0, 1), flat, self.cluster_size.numel())
        counts, skipped = reduce_counts(counts, (~finite & (indices >= 0)).sum())
        if not counted:
            self.skipped_rows.add_(skipped)
        sums = all_reduce(sums).view(self.embed_avg.shape)
        counts = counts.view(self.cluster_size.shape).to(sums)
        if callable(weight):
            weight = weight(sums, counts)
        if self._pending is not None:
            sums, counts = sums + self._pending[0].to(sums), counts + self._pending[1].to(sums)
        self._pending = (sums, counts) if accumulate else None
        if accumulate:
            return
        rate: float | Tensor = 1 - self.decay
        if weight is not None:
            size = self.cluster_size
            if weight.shape not in (size.shape, size.shape[1:]):
                raise ValueError(
                    f"ema_update_weight must have shape {tuple(size.shape)} or "
                    f"{tuple(size.shape[1:])}, got {tuple(weight.shape)}"
                )
            rate = (weight * rate).to(size).expand_as(size)
        update_running(self.cluster_size, self.embed_avg, counts, sums, rate)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Codes from the running statistics, the counts smoothed after Laplace."""
        codes = smoothed_means(self.cluster_size, self.embed_avg, self.eps)
        self.embed.copy_(unit(codes) if self.use_cosine_sim else codes)
        self.any_length = isinstance(self.embed, nn.Parameter)

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """Moves codes that are hardly hit to random rows; all processes alike.

        Rows are drawn whether or not a code is dead: every process enters the same collectives.

        Args:
            batch_samples: [H, ..., D].
            seq_mask: [H, N], False for rows not to draw.
        """
        if self.threshold_ema_dead_code <= 0 or not self.training:
            return
        dead = self.cluster_size < self.threshold_ema_dead_code
        drawn = []
        for number, rows in enumerate(batch_samples.flatten(1, -2)):
            rows = sample_rows(
                rows if seq_mask is None else rows[seq_mask[number]], self.codebook_size
            )
            drawn.append(rows[(dead[number].cumsum(0) - 1).clamp(min=0)])
        samples = torch.stack(drawn)
        if self.use_cosine_sim:
            samples = unit(samples)
        dead = dead & samples.isfinite().all(dim=-1)
        self.embed.copy_(torch.where(dead.unsqueeze(-1), samples, self.embed))
        reset_running(
            dead, samples, self.threshold_ema_dead_code, self.cluster_size, self.embed_avg
        )


def _see_lengths(book: Codebook, _: object) -> None:
    """After loading: whether all codes have length 1, as all that move them leave them."""
    lengths = book.codes.detach().norm(dim=-1)
    book.any_length = book.any_length or bool(((lengths - 1).abs() > 1e-2).any())


def _by_book(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function of each codebook's part of tensors [H, ...], joined: [H, ...]."""
    parts = [function(*each) for each in zip(*tensors, strict=True)]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
