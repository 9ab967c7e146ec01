"""The search for the nearest code alone, against other searches and against a matrix product."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.agreement import check_near_ties, unit_groups
from benchmarks.cases import DIMS
from benchmarks.timing import clock, interleave, rounds_within
from tokenflow_ext import nearest_code

DIM = sum(DIMS)
NOTE = (
    f"GFLOP/s counts 2 N K {DIM} for every search, whatever it really does. `product` forms the "
    "[N, K] scores in memory that is there and searches nothing; `square product` is a product of "
    "two 2048 x 2048 matrices, counted as 2 * 2048^3: torch's own rate at its best."
)
TITLE = "Search alone, float32, width 40 = 32 + 8, {device}"


def _product_argmax(z, codes):
    transposed = codes.T
    return lambda: (z @ transposed).argmax(dim=1)


def _cdist_argmin(z, codes):
    return lambda: torch.cdist(z, codes).argmin(dim=1)


def _faiss(z, codes):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(DIM)
    index.add(codes.numpy())
    rows = z.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1]).flatten()


def _vector_quantize(z, codes):
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(DIM, codes.shape[0], use_cosine_sim=True).to(z.device).eval()
    # All codes have the same length, so cosine similarity over all columns ranks them the same.
    quantizer.codebook = torch.nn.functional.normalize(codes, dim=-1)

    def call():
        with torch.no_grad():
            return quantizer(z.unsqueeze(0))[1].flatten()

    return call


# Name -> (builder from unit rows and unit codes, package it needs, devices)
SEARCHES = {
    "product + argmax (eager)": (_product_argmax, None, ("cpu", "cuda")),
    "torch.cdist + argmin": (_cdist_argmin, None, ("cpu", "cuda")),
    "faiss IndexFlatIP": (_faiss, "faiss", ("cpu",)),
    "VectorQuantize, forward": (_vector_quantize, "vector_quantize_pytorch", ("cpu", "cuda")),
}


@pytest.mark.parametrize("codebook_size", [8192, 32768])
def test_search(benchmark, report, budget, device, codebook_size, batch):
    count = batch * 27 * 27  # the last scale of XL
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, DIM, generator=generator).to(device)
    codebook = torch.randn(codebook_size, DIM, generator=generator).to(device)
    z, codes = unit_groups(rows).float(), unit_groups(codebook).float()

    def ours():
        return nearest_code(rows, codebook, DIMS)

    rivals, missing = {}, []
    for name, (builder, package, devices) in SEARCHES.items():
        if device not in devices:
            continue
        if package and importlib.util.find_spec(package) is None:
            missing.append(name)
            continue
        rivals[name] = builder(z, codes)
    expected = ours()
    differing = {name: check_near_ties(rows, codebook, expected, rivals[name]()) for name in rivals}

    scores = torch.empty(count, codebook_size, device=device)
    square = torch.randn(2048, 2048, generator=generator).to(device)
    out = torch.empty_like(square)
    rivals["product"] = lambda: torch.mm(z, codes.T, out=scores)
    rivals["square product"] = lambda: torch.mm(square, square, out=out)

    calls = {"ours": ours, **rivals}
    begin = clock()
    for call in calls.values():
        call()
    times = interleave(benchmark, ours, rivals, rounds_within(budget, clock() - begin))

    for name in calls:
        work = 2 * 2048**3 if name == "square product" else 2 * count * codebook_size * DIM
        _add(
            report,
            device,
            {
                "N": str(count),
                "K": str(codebook_size),
                "search": name,
                "ms": f"{times.median(name) * 1e3:.2f}",
                "GFLOP/s": f"{work / times.median(name) / 1e9:.1f}",
                "its time / ours": "" if "square" in name else f"{times.ratio(name):.2f}",
                "indices that differ": str(differing.get(name, "")),
            },
        )
    for name in missing:
        row = {"N": str(count), "K": str(codebook_size), "search": name, "ms": "not installed"}
        _add(
            report,
            device,
            {**row, "GFLOP/s": "", "its time / ours": "", "indices that differ": ""},
        )
    benchmark.extra_info.update({name: times.median(name) for name in calls})


def _add(report, device: str, row: dict[str, str]) -> None:
    report.add(f"search {device}", TITLE.format(device=device), NOTE, row)
