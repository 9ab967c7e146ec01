"""The whole quantizer, ours against the baselines: time and peak memory of one call."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks import roofline
from benchmarks.agreement import check_results
from benchmarks.cases import DEVICES, IMPLEMENTATIONS, MODES, Case, available_baselines, build
from benchmarks.timing import clock, interleave, rounds_within


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    shapes = [(p, k, mode) for p in ("B", "XL") for k in (8192, 32768) for mode in MODES]
    if option("--large"):
        shapes.append(("XL", 131072, "forward"))
    cases = [Case(*shape, option("--batch-size"), device) for device in DEVICES for shape in shapes]
    names = [f"{case.device}-{case.pyramid}-{case.codebook_size}-{case.mode}" for case in cases]
    metafunc.parametrize("case", cases, ids=names)


def test_quantizer(request, benchmark, record, ceilings, memory, budget, case):
    ours, calls = build(case, "ours"), {}
    expected = ours()  # also the warm-up
    results = {}
    for name, reason in available_baselines(case, request.config.getoption("--compile")).items():
        results[name] = {"left_out": reason}
        if reason:
            continue
        try:
            call = build(case, name)
            result = call()
        except Exception as error:  # whatever a compiler or a package raises
            if not IMPLEMENTATIONS[name].foreign:
                raise
            results[name] = {"left_out": f"fails ({type(error).__name__})"}
            continue
        results[name] = {"differ": check_results(case, ours, expected, result)}
        calls[name] = call
        del result
    del expected

    samples = {ceiling.name: ceiling.sample for ceiling in ceilings(case.device)}
    begin = clock()
    for call in (ours, *calls.values(), *samples.values()):
        call()
    times = interleave(benchmark, ours, calls, samples, rounds_within(budget, clock() - begin))

    results = {"ours": {"differ": 0}, **results}
    for name in ("ours", *calls):
        results[name] |= {
            "seconds": times.median(name),
            "ratio": times.ratio(name),
            "bytes": memory.peak(case, name),
        }
    if case.device == "cpu":
        matrix = case.rows * case.codebook_size * 4
        assert results["ours"]["bytes"] < matrix, "ours holds as much as the last scale's distances"
    work = roofline.quantizer_work(case)
    record(
        {
            "kind": "quantizer",
            **asdict(case),
            "tokens": case.tokens,
            "rounds": len(times.by_name["ours"]),
            "work": asdict(work),
            "scores": case.tokens * case.codebook_size,
            "fractions": roofline.fractions_of_bounds(work, times.by_name["ours"], times.ceilings),
            "results": results,
            "ceilings": times.ceilings,
        }
    )
