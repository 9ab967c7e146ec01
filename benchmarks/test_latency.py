"""One image on a GPU: a call launched kernel by kernel, and the same replayed as a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import Case, build
from benchmarks.timing import clock, graph_of, interleave, rounds_within


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pyramid", ["B", "XL"])
def test_graph_latency(benchmark, record, budget, pyramid):
    case = Case(pyramid, 32768, "forward", 1, "cuda")
    call = build(case, "ours")
    replay, (captured, *_) = graph_of(call)
    replay()
    expected = call()[0]
    assert torch.equal(captured.indices, expected.indices)
    assert torch.equal(captured.quantized, expected.quantized)

    begin = clock()
    replay()
    call()
    times = interleave(
        benchmark, replay, {"launched": call}, {}, rounds_within(budget, clock() - begin)
    )
    record(
        {
            "kind": "latency",
            "device": case.device,
            "pyramid": pyramid,
            "codebook_size": case.codebook_size,
            "rounds": len(times.by_name["ours"]),
            "graph": times.median("ours"),
            "launched": times.median("launched"),
        }
    )
