"""Times of the search, the pyramids and the sampler on a GPU: `python -m benchmarks.gpu time`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import DIMS
from benchmarks.gpu_calls import DIM, Lines, Settings, features, quantizer_for, step
from benchmarks.timing import graph_of, median
from benchmarks.timing import measure as compare
from tokenflow_ext import MultiScaleQuantizer, nearest_code, sample_top_k_top_p


def _copy_rate(device: str) -> float:
    """Bytes a second, read and written."""
    block = torch.ones(2**28, device=device)
    other = torch.empty_like(block)
    return 2 * block.nbytes / median(lambda: other.copy_(block), 10)


def _kernels(call: Callable[[], object], most: int = 12) -> Lines:
    """Microseconds of each kernel of a call, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    repeats = 5
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found = [
        (event.self_device_time_total / repeats, event.count / repeats, event.key)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    yield f"    kernels: {sum(time for time, _, _ in found):.1f} us"
    for microseconds, count, name in sorted(found, reverse=True)[:most]:
        short = name.replace("tokenflow::cuda::", "").replace("(anonymous namespace)::", "")
        yield f"    {microseconds:9.1f} us {count:5.1f} x {short[:90]}"


def _timed(
    settings: Settings, name: str, call: Callable[[], object], detail: bool = False
) -> Lines:
    launched = median(call, 20)
    line = f"{name}: {1e3 * launched:.4f} ms"
    if settings.device == "cuda" and detail:
        line += f", as a graph {1e3 * median(graph_of(call)[0], 20):.4f} ms"
    yield line
    if settings.device == "cuda" and detail:
        yield from _kernels(call)


def _both_searches(rows: Tensor, codebook: Tensor) -> Lines:
    """The search by products of a warp and by those of four, in turns."""

    def search(name: str) -> Callable[[], object]:
        with patch.dict(os.environ, {"TOKENFLOW_CUDA_SEARCH": name}):
            return graph_of(lambda: nearest_code(rows, codebook, DIMS))[0]

    try:
        calls = {"mma": search("mma"), "ours": search("wgmma")}
    except RuntimeError as error:
        yield f"    wgmma: {error}"
        return
    found = compare(calls, 60)
    yield (
        f"    mma {1e3 * found['theirs']:.4f} ms, wgmma {1e3 * found['ours']:.4f} ms, "
        f"{found['ratio']:.2f} times"
    )


def measure(settings: Settings) -> Lines:
    device = settings.device
    copy = _copy_rate(device)
    yield f"copy: {copy / 1e9:.0f} GB/s read and written"
    codebook = settings.randn(settings.codes, DIM)
    for count in (8192, 23328):
        rows = settings.randn(count, DIM)
        call = lambda rows=rows: nearest_code(rows, codebook, DIMS)  # noqa: E731
        yield from _timed(settings, f"search, {count} rows, {settings.codes} codes", call, True)
        best = median(graph_of(call)[0] if device == "cuda" else call, 20)
        work = 2 * count * settings.codes * DIM
        yield f"    {work / best / 1e12:.1f} TFLOP/s counted as 2 N K {DIM}"
        z, c = (torch.nn.functional.normalize(t, dim=1) for t in (rows, codebook))
        eager = median(lambda z=z, c=c: (z @ c.T).argmax(1), 5)
        yield f"    product + argmax in float32: {1e3 * eager:.3f} ms, {eager / best:.1f} times"
        if device == "cuda":
            yield from _both_searches(rows, codebook)
    for pyramid, batch in (("B", 1), ("B", 32), ("XL", 32)):
        case = Settings(device, settings.codes, pyramid, batch, settings.seconds)
        quantizer = quantizer_for(case, device)
        h, grad = (t.to(device) for t in features(case))

        def forward(quantizer: MultiScaleQuantizer = quantizer, h: Tensor = h) -> object:
            with torch.no_grad():
                return quantizer.eval()(h)

        def both(
            quantizer: MultiScaleQuantizer = quantizer, h: Tensor = h, grad: Tensor = grad
        ) -> object:
            return step(quantizer.train(), h, grad)

        yield from _timed(settings, f"{pyramid}, batch {batch}, forward", forward, True)
        yield from _timed(settings, f"{pyramid}, batch {batch}, forward+backward", both)
        if device == "cuda" and batch > 1:
            yield from _kernels(both)
    for dtype in (torch.float32, torch.bfloat16):
        logits, uncond = (settings.randn(4096, settings.codes, dtype=dtype) for _ in range(2))
        for top_k, top_p in ((1200, 0.8), (100, 0.8), (1, 0.0), (0, 0.9)):
            options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "guidance": 3.75}

            def draw(
                rows: int = 4096,
                logits: Tensor = logits,
                uncond: Tensor = uncond,
                options: dict[str, Any] = options,
            ) -> object:
                return sample_top_k_top_p(
                    logits[:rows], uncond=uncond[:rows], check=False, **options
                )

            name = (
                f"sampler, 4096 rows of {str(dtype).removeprefix('torch.')}, k {top_k}, p {top_p}"
            )
            yield from _timed(settings, name, draw)
            took = median(draw, 10)
            yield f"    logits read: {2 * logits.nbytes / took / copy:.0%} of copy"
        few = lambda draw=draw: draw(16)  # noqa: E731
        yield from _timed(settings, f"sampler, 16 rows of {dtype}", few, True)
