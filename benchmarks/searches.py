"""Searches for the nearest of unit codes, ours left out: alone and as a part of the baselines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Two float32 searches may differ where two squared distances are as close as this.
NEAR_TIE = 4e-6
# TF32 keeps 10 bits of each factor: inner products of such rows are off by up to about 2^-9.
TF32_NEAR_TIE = 8e-3

Query = Callable[[Tensor], Tensor]
"""Unit rows [N, D] -> index of the nearest code of each, [N] int64."""


def product_argmax(codes: Tensor) -> Query:
    """Of unit vectors the nearest is the one with the largest inner product."""
    transposed = codes.T
    return lambda rows: (rows @ transposed).argmax(dim=1)


def compiled_product_argmax(codes: Tensor) -> Query:
    query = _compiled_query()
    transposed = codes.T
    return lambda rows: query(rows, transposed)


@functools.cache
def _compiled_query() -> Callable[..., Tensor]:
    return torch.compile(lambda rows, codes: (rows @ codes).argmax(dim=1), dynamic=False)


def cdist_argmin(codes: Tensor) -> Query:
    return lambda rows: torch.cdist(rows, codes).argmin(dim=1)


def faiss_flat(codes: Tensor) -> Query:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(codes.shape[1])
    index.add(codes.numpy())
    return lambda rows: torch.from_numpy(index.search(rows.numpy(), 1)[1]).flatten()


class VectorQuantizeCosine:
    """`VectorQuantize` with cosine similarity, in evaluation: it neither moves nor replaces codes.

    All codes have the same length, so cosine similarity over all columns ranks them as their
    inner products do.
    """

    def __init__(self, codes: int, dim: int, device: str) -> None:
        from vector_quantize_pytorch import VectorQuantize

        self.quantizer = VectorQuantize(dim, codes, use_cosine_sim=True).to(device).eval()

    def __call__(self, codes: Tensor) -> Query:
        self.quantizer.codebook = F.normalize(codes, dim=-1)
        return self.query

    def query(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return self.quantizer(rows.unsqueeze(0))[1].flatten()


def flash_kmeans(codes: Tensor) -> Query:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    def query(rows: Tensor) -> Tensor:
        squares = rows.square().sum(dim=1)
        return euclid_assign_triton(rows[None], codes[None], squares[None])[0].long()

    return query


@dataclass(frozen=True)
class Search:
    """A way to find the nearest code."""

    prepare: Callable[[int, int, str], Callable[[Tensor], Query]]
    """(K, D, device) -> function of unit codes [K, D] that takes them in and returns a query."""
    includes: str
    """What one query does, for the report."""
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    near_tie: float = NEAR_TIE
    compiled: bool = False

    @property
    def foreign(self) -> bool:
        """Other people's code does the work: where it fails, the table says so."""
        return self.compiled or self.package is not None


def _stateless(build: Callable[[Tensor], Query]) -> Callable[..., Any]:
    return lambda codes, dim, device: build


SEARCHES = {
    "product + argmax": Search(
        _stateless(product_argmax), "one matrix product [N, K] in memory, argmax"
    ),
    "product + argmax, compiled": Search(
        _stateless(compiled_product_argmax), "torch.compile of the same", compiled=True
    ),
    "torch.cdist + argmin": Search(
        _stateless(cdist_argmin), "Euclidean distances [N, K] in memory, argmin"
    ),
    "faiss IndexFlatIP": Search(
        _stateless(faiss_flat), "faiss's exact index of inner products", "faiss", ("cpu",)
    ),
    "VectorQuantize": Search(
        VectorQuantizeCosine,
        "vector-quantize-pytorch's forward with cosine similarity, in evaluation: product, "
        "argmax, a one-hot matrix, and a gather of the codes",
        "vector_quantize_pytorch",
    ),
    "flash-kmeans": Search(
        _stateless(flash_kmeans),
        "flash-kmeans' Triton assignment, which multiplies in TF32: indices may differ where two "
        f"squared distances are within {TF32_NEAR_TIE:g}",
        "flash_kmeans",
        ("cuda",),
        TF32_NEAR_TIE,
    ),
}
