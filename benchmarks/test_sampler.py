"""The sampler against eager forms of it, and against memory: each logit has to be read once."""

from __future__ import annotations

import functools
import importlib.util
import statistics

import pytest
import torch

from benchmarks.roofline import COPY
from benchmarks.samplers import SAMPLERS, Settings
from benchmarks.timing import clock, interleave, rounds_within
from tokenflow_ext import sample_top_k_top_p
from tokenflow_ext.reference import filtered_probabilities

CODES = 32768
STEPS = {
    "three-step, 1st": Settings(1200, 0.8, 3.75),
    "three-step, 2nd": Settings(100, 0.8, 3.75),
    "last": Settings(1, 0.0, 3.75),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_sampler(benchmark, record, ceilings, budget, device, batch, step, dtype):
    rows, settings = batch * 256, STEPS[step]
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, CODES, generator=generator) * 2).to(device, dtype)
    uncond = torch.randn(rows, CODES, generator=generator).to(device, dtype)
    arguments = {"top_k": settings.top_k, "top_p": settings.top_p, "guidance": settings.guidance}

    def ours() -> torch.Tensor:
        return sample_top_k_top_p(logits, uncond=uncond, check=False, **arguments)

    few = slice(0, 16)
    support = filtered_probabilities(logits[few].double(), uncond=uncond[few].double(), **arguments)
    assert (support.gather(1, ours()[few, None]) > 0).all()

    results, calls = {}, {}
    for name, sampler in SAMPLERS.items():
        if device not in sampler.devices:
            continue
        if sampler.package and importlib.util.find_spec(sampler.package) is None:
            results[name] = {"left_out": "not installed"}
            continue
        calls[name] = functools.partial(sampler.draw, logits, uncond, settings)
        try:
            calls[name]()
        except Exception as error:  # whatever a package raises
            if sampler.package is None:
                raise
            results[name] = {"left_out": f"fails ({type(error).__name__})"}
            del calls[name]

    copy = {ceiling.name: ceiling.sample for ceiling in ceilings(device) if ceiling.name == COPY}
    begin = clock()
    for call in (ours, *calls.values(), *copy.values()):
        call()
    times = interleave(benchmark, ours, calls, copy, rounds_within(budget, clock() - begin))

    read = 2 * logits.numel() * logits.element_size()
    results = {"ours": {}, **{name: {} for name in calls}, **results}
    for name in ("ours", *calls):
        results[name] |= {
            "seconds": times.median(name),
            "ratio": times.ratio(name),
            "of_copy": statistics.median(
                read / seconds / rate
                for seconds, rate in zip(times.by_name[name], times.ceilings[COPY], strict=True)
            ),
        }
    record(
        {
            "kind": "sampler",
            "device": device,
            "batch": batch,
            "rows": rows,
            "codes": CODES,
            "step": step,
            **arguments,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": read,
            "rounds": len(times.by_name["ours"]),
            "results": results,
            "ceilings": times.ceilings,
        }
    )
