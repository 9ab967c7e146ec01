"""The codebook under the stand-ins for vector-quantize-pytorch, and what they share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.collectives import all_reduce, sample_rows

EPS = 1e-6


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


def shared_seed(device: torch.device) -> int:
    """A random number that every process agrees on."""
    return int(all_reduce(torch.randint(0, 10_000, (), device=device)))


class Codebook(nn.Module):
    """Codes, the running statistics that move them, and the search.

    Attributes:
        embed: codes [1, K, D], a parameter where something learns them by gradient.
        embed_avg: running sums of the rows of each code, [1, K, D].
        cluster_size: running counts of them, [1, K].
        initted: whether k-means has run, where it is asked for.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        kmeans_init: bool,
        kmeans_iters: int,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        ema_update: bool,
        learnable: bool,
        use_cosine_sim: bool,
    ) -> None:
        super().__init__()
        self.kmeans_init = kmeans_init
        self.kmeans_iters = kmeans_iters
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.ema_update = ema_update
        self.use_cosine_sim = use_cosine_sim
        embed = torch.zeros(1, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            if use_cosine_sim:
                embed = unit(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    @property
    def codes(self) -> Tensor:
        """[K, D] float32."""
        return self.embed[0].float()

    def search(self, rows: Tensor) -> Tensor:
        """Nearest codes [N] of rows [N, D] float32."""
        return ops.nearest_code(rows.detach(), self.codes.detach(), l2_norm=self.use_cosine_sim)

    @torch.no_grad()
    def init_once(self, rows: Tensor) -> None:
        """k-means on the first rows [N, D] that come, of all processes, where it was asked for."""
        if not self.kmeans_init or self.initted:
            return
        means = sample_rows(rows, self.embed.shape[1])
        for _ in range(self.kmeans_iters):
            index = ops.nearest_code(rows, means, l2_norm=self.use_cosine_sim)
            sums, counts = map(all_reduce, ops.segment_sum(rows, index, len(means)))
            new = sums / counts.clamp(min=1).unsqueeze(1)
            if self.use_cosine_sim:
                new = unit(new)
            means = torch.where(counts.unsqueeze(1) > 0, new, means)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(means * counts.unsqueeze(1))
        self.average()
        self.initted.fill_(True)

    @torch.no_grad()
    def track(self, rows: Tensor, indices: Tensor) -> None:
        """Adds rows [N, D] to the running statistics of their codes; an index of -1 is skipped."""
        sums, counts = map(all_reduce, ops.segment_sum(rows, indices, self.embed.shape[1]))
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)
        self.embed_avg.lerp_(sums.to(self.embed_avg), 1 - self.decay)

    @torch.no_grad()
    def average(self) -> None:
        """Codes from the running statistics, the counts smoothed after Laplace."""
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.cluster_size.numel() * self.eps)
        codes = self.embed_avg / (smoothed * total).unsqueeze(-1)
        self.embed.copy_(unit(codes) if self.use_cosine_sim else codes)

    @torch.no_grad()
    def expire(self, rows: Tensor, kept: Tensor | None = None) -> None:
        """Moves codes that are hardly hit to random rows [N, D], where `kept` [N]; all ranks alike.

        Rows are drawn whether or not a code is dead: every process enters the same collectives.
        """
        if kept is not None and bool(kept.any()):
            rows = rows[kept]
        dead = self.cluster_size[0] < self.threshold_ema_dead_code
        samples = sample_rows(rows, len(dead))[(dead.cumsum(0) - 1).clamp(min=0)]
        self.embed.copy_(torch.where(dead.unsqueeze(1), samples, self.embed))
        samples = samples * self.threshold_ema_dead_code
        self.embed_avg.copy_(torch.where(dead.unsqueeze(1), samples, self.embed_avg))
        self.cluster_size.masked_fill_(dead, self.threshold_ema_dead_code)
