"""The search for the nearest code alone, against other searches."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import asdict

import pytest
import torch

from benchmarks import roofline
from benchmarks.agreement import check_near_ties, unit_groups
from benchmarks.cases import DIMS, PYRAMIDS
from benchmarks.searches import SEARCHES
from benchmarks.timing import clock, interleave, rounds_within
from tokenflow_ext import nearest_code

DIM = sum(DIMS)


@pytest.mark.parametrize("codebook_size", [8192, 32768])
def test_search(request, benchmark, record, ceilings, budget, device, codebook_size, batch):
    count = batch * PYRAMIDS["XL"][-1] ** 2
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, DIM, generator=generator).to(device)
    codebook = torch.randn(codebook_size, DIM, generator=generator).to(device)
    z, codes = unit_groups(rows).float(), unit_groups(codebook).float()

    def ours() -> torch.Tensor:
        return nearest_code(rows, codebook, DIMS)

    expected, results, calls = ours(), {}, {}
    for name, search in SEARCHES.items():
        compiled = search.compiled
        if device not in search.devices or (compiled and not request.config.getoption("--compile")):
            continue
        if search.package and importlib.util.find_spec(search.package) is None:
            results[name] = {"left_out": "not installed"}
            continue
        try:
            query = search.prepare(codebook_size, DIM, device)(codes)
            found = query(z)
        except Exception as error:  # whatever a compiler or a package raises
            if not search.foreign:
                raise
            results[name] = {"left_out": f"fails ({type(error).__name__})"}
            continue
        differ = check_near_ties(rows, codebook, expected, found, search.near_tie)
        results[name] = {"differ": differ}
        calls[name] = functools.partial(query, z)

    samples = {ceiling.name: ceiling.sample for ceiling in ceilings(device)}
    begin = clock()
    for call in (ours, *calls.values(), *samples.values()):
        call()
    times = interleave(benchmark, ours, calls, samples, rounds_within(budget, clock() - begin))

    work = roofline.search_work(count, codebook_size)
    results = {"ours": {"differ": 0}, **results}
    for name in ("ours", *calls):
        results[name] |= {
            "seconds": times.median(name),
            "ratio": times.ratio(name),
            "fractions": roofline.fractions_of_bounds(work, times.by_name[name], times.ceilings),
        }
    record(
        {
            "kind": "search",
            "device": device,
            "batch": batch,
            "rows": count,
            "codebook_size": codebook_size,
            "rounds": len(times.by_name["ours"]),
            "work": asdict(work),
            "results": results,
            "ceilings": times.ceilings,
        }
    )
