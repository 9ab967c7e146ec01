"""The whole quantizer, ours against the baselines: time and peak memory of one call."""

from __future__ import annotations

import pytest

from benchmarks.agreement import check_results
from benchmarks.cases import MODES, Case, build
from benchmarks.timing import clock, interleave, rounds_within

WORK = "float32, groups (32, 8), batch {batch}, {device}"
TIME_NOTE = "Medians of time, and medians over interleaved rounds of the two sides' ratio."
MEMORY_NOTE = "Peak of one call beyond the state before it: {what}."
MEMORY = {
    "cpu": "resident memory of a fresh process",
    "cuda": "what torch's allocator handed out",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codebook_size", [8192, 32768])
@pytest.mark.parametrize("pyramid", ["B", "XL"])
def test_quantizer(
    request, benchmark, report, memory, batch, budget, device, pyramid, codebook_size, mode
):
    case = Case(pyramid, codebook_size, mode, batch, device)
    names = ["released", "eager"] + ["compiled"] * request.config.getoption("--compile")
    ours = build(case, "ours")
    rivals = {name: build(case, name) for name in names}

    # Also the warm-up of everyone.
    result = ours()
    failures = {}
    if "compiled" in names:
        try:
            rivals["compiled"]()
        except Exception as error:  # whatever the compiler raises
            failures["compiled"] = f"fails ({type(error).__name__})"
            del rivals["compiled"]
    differing = {name: check_results(case, ours, result, call()) for name, call in rivals.items()}
    del result
    begin = clock()
    for call in (ours, *rivals.values()):
        call()
    times = interleave(benchmark, ours, rivals, rounds_within(budget, clock() - begin))

    peak = {name: memory.peak(case, name) for name in ["ours", *rivals]}
    if device == "cpu":
        matrix = case.rows * codebook_size * 4 / 2**20
        assert peak["ours"] < matrix, "ours holds as much as a distance matrix of the last scale"
    tokens = batch * sum(side * side for side in case.sides)
    line = {"pyramid": pyramid, "K": str(codebook_size), "work": mode}
    time_row = {**line, "ours ms": f"{times.median('ours') * 1e3:.2f}"}
    memory_row = {**line, "ours MiB": f"{peak['ours']:.1f}"}
    for name in names:
        if name in failures:
            time_row |= {f"{name} ms": failures[name], f"{name} / ours": ""}
            memory_row |= {f"{name} MiB": failures[name], f"{name} / ours": ""}
            continue
        time_row[f"{name} ms"] = f"{times.median(name) * 1e3:.2f}"
        time_row[f"{name} / ours"] = f"{times.ratio(name):.2f}"
        memory_row[f"{name} MiB"] = f"{peak[name]:.1f}"
        memory_row[f"{name} / ours"] = f"{peak[name] / peak['ours']:.1f}"
    time_row["rounds"] = str(len(times.by_name["ours"]))
    time_row["tokens that differ"] = f"{max(differing.values())} of {tokens}"
    work = WORK.format(batch=batch, device=device)
    report.add(f"time {device}", f"Quantizer, time: {work}", TIME_NOTE, time_row)
    note = MEMORY_NOTE.format(what=MEMORY[device])
    report.add(f"memory {device}", f"Quantizer, memory: {work}", note, memory_row)
    benchmark.extra_info.update({"time": time_row, "memory": memory_row})
