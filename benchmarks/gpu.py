"""What to run in the first minutes with a GPU: `python -m benchmarks.gpu MODE... [--out DIR]`.

    smoke      every operator once, on ragged sizes; small enough for compute-sanitizer
    sanitize   smoke under the four tools of compute-sanitizer, one process each, at the same time
    agree      a training step at full size against the CPU kernels on the same inputs
    soak       the same step again and again beside matrix products: every bit must stay
    threads    samplers of different sizes from several threads at once
    odd        inputs that make many codes tie, against ordinary inputs of the same size
    time       graphs and calls of the search, the pyramids and the sampler, kernel by kernel

Each mode prints its lines and, with --out, writes them to DIR/MODE.txt. A mode that finds something
wrong makes the program end with status 1. All but `sanitize` run on the CPU too (--device cpu).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import DIMS, PYRAMIDS
from benchmarks.timing import seconds
from tokenflow_ext import (
    MultiScaleQuantizer,
    nearest_code,
    sample_code,
    sample_top_k_top_p,
    segment_sum,
)
from tokenflow_ext.var import VarQuantizer

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DIM = sum(DIMS)


class Wrong(Exception):
    """A mode found a wrong result; the message says which."""


@dataclass(frozen=True)
class Settings:
    """Where and how much."""

    device: str
    codes: int
    pyramid: str
    batch: int
    seconds: float

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)


Lines = Iterator[str]


def _quantizer(settings: Settings, device: str) -> MultiScaleQuantizer:
    quantizer = MultiScaleQuantizer(
        settings.codes, DIMS, PYRAMIDS[settings.pyramid], scale_drop=0.0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for codebook in quantizer.codebooks:
            codebook.copy_(torch.randn(codebook.shape, generator=generator))
    return quantizer.to(device).train()


def _step(quantizer: MultiScaleQuantizer, h: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward: indices, features, loss and all gradients."""
    h = h.detach().requires_grad_()
    out = quantizer(h)
    loss = out.vq_loss + out.commitment_loss
    wanted = {"gradient of h": h, **{f"codebook {i}": c for i, c in enumerate(quantizer.codebooks)}}
    gradients = torch.autograd.grad([out.quantized, loss], list(wanted.values()), [grad, None])
    found = {"indices": out.indices, "quantized": out.quantized, "loss": loss}
    return {k: v.detach() for k, v in found.items()} | dict(zip(wanted, gradients, strict=True))


def _features(settings: Settings) -> tuple[Tensor, Tensor]:
    side = PYRAMIDS[settings.pyramid][-1]
    shape = (settings.batch, DIM, side, side)
    return torch.randn(shape), torch.randn(shape)


def smoke(settings: Settings) -> Lines:
    device = settings.device
    shapes = [((32, 8), 777, False), ((7,), 130, False), ((100, 20), 300, False)]
    for dims, codes, atomic in [*shapes, ((32, 8), 777, True)]:
        quantizer = MultiScaleQuantizer(
            codes, dims, (1, 2, 3, 5), atomic_codebook_gradient=atomic
        ).to(device)
        h = settings.randn(3, sum(dims), 5, 6).requires_grad_()
        out = quantizer(h)
        (out.quantized.square().sum() + out.vq_loss + out.commitment_loss).backward()
        quantizer.eval()
        quantizer.decode(quantizer.encode(h.detach()), size=(5, 6))
    var = VarQuantizer(300, 16, (1, 2, 4), phi_shared=2).to(device)
    h = settings.randn(2, 16, 4, 4).requires_grad_()
    # initcheck does not see what cuDNN's convolutions write.
    with torch.backends.cudnn.flags(enabled=False):
        out = var(h)
        (out.quantized.sum() + out.vq_loss + out.commitment_loss).backward()

    rows, codebook = settings.randn(500, 40), settings.randn(900, 40)
    nearest_code(rows, codebook, DIMS)
    nearest_code(rows, codebook, l2_norm=False)
    nearest_code(torch.zeros_like(rows), codebook, DIMS)
    nearest_code(rows, codebook[:1].expand(300, 40).contiguous(), DIMS)
    sample_code(rows[:70], codebook, seed=1)
    for indices in (torch.arange(500) % 900, torch.zeros(500, dtype=torch.int64)):
        segment_sum(rows, indices.to(device), 900)
    for codes in (1000, 4097, 32768, 40000):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            logits, uncond = (settings.randn(5, codes, dtype=dtype) for _ in range(2))
            for top_k, top_p in ((50, 0.9), (0, 0.9), (1, 0.0), (0, 0.0)):
                sample_top_k_top_p(logits, uncond=uncond, guidance=2.0, top_k=top_k, top_p=top_p)
    if device == "cuda":
        torch.cuda.synchronize()
    yield "every operator ran"


def sanitize(settings: Settings) -> Lines:
    if settings.device != "cuda":
        raise Wrong("compute-sanitizer needs a GPU")
    # Allocations of their own show what a pool of memory would hide.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "smoke"]
    running = {
        tool: subprocess.Popen(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in TOOLS
    }
    failed = []
    for tool, process in running.items():
        output = process.communicate()[0].splitlines()
        yield f"{tool}: exit {process.returncode}: {output[-1] if output else 'no output'}"
        if process.returncode:
            failed.append(tool)
            yield from output[:12]
    if failed:
        raise Wrong(f"compute-sanitizer found errors: {', '.join(failed)}")


def agree(settings: Settings) -> Lines:
    h, grad = _features(settings)
    expected = _step(_quantizer(settings, "cpu"), h, grad)
    found = _step(
        _quantizer(settings, settings.device), *(t.to(settings.device) for t in (h, grad))
    )
    differ = int((found["indices"].cpu() != expected["indices"]).sum())
    yield f"{differ} of {expected['indices'].numel()} indices differ from the CPU kernels'"
    if differ:
        raise Wrong("indices differ from the CPU's")
    for name in expected:
        if name != "indices":
            scale = expected[name].abs().max()
            error = float((found[name].cpu() - expected[name]).abs().max() / scale)
            yield f"{name}: largest difference over the largest value {error:.1e}"
            if not error < 1e-5:
                raise Wrong(f"{name} differs")


def soak(settings: Settings) -> Lines:
    quantizer = _quantizer(settings, settings.device)
    h, grad = (t.to(settings.device) for t in _features(settings))
    expected = {name: value.clone() for name, value in _step(quantizer, h, grad).items()}
    other = torch.randn(2048, 2048, device=settings.device)
    side = torch.cuda.Stream() if settings.device == "cuda" else None
    end, steps = time.monotonic() + settings.seconds, 0
    while time.monotonic() < end or steps == 0:
        with torch.cuda.stream(side) if side else torch.no_grad():
            other @ other
        for name, value in _step(quantizer, h, grad).items():
            if not torch.equal(value, expected[name]):
                raise Wrong(f"{name} has other bits in step {steps}")
        steps += 1
    yield f"{steps} steps, all with the bits of the first"


def threads(settings: Settings) -> Lines:
    errors: list[str] = []
    expected = {}

    def draw(codes: int) -> Tensor:
        logits = torch.randn(64, codes, generator=torch.Generator().manual_seed(codes))
        return sample_top_k_top_p(logits.to(settings.device), top_k=100, top_p=0.9, seed=1)

    def work(codes: int) -> None:
        try:
            side = torch.cuda.Stream() if settings.device == "cuda" else None
            with torch.cuda.stream(side) if side else torch.no_grad():
                end = time.monotonic() + settings.seconds
                while time.monotonic() < end:
                    if not torch.equal(draw(codes), expected[codes]):
                        raise Wrong("other draws than one thread's")
        except Exception as error:
            errors.append(f"{codes} codes: {error}")

    sizes = (32768, 20000, 16384, 5000)
    for codes in sizes:
        expected[codes] = draw(codes)
    workers = [threading.Thread(target=work, args=(codes,)) for codes in sizes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise Wrong("; ".join(errors))
    yield f"{len(sizes)} threads drew what one does"


def odd(settings: Settings) -> Lines:
    rows, codes = settings.randn(8192, DIM), settings.randn(settings.codes, DIM)
    if settings.device == "cpu":
        rows = rows[:512]
    zero, giant, copies, missing = rows.clone(), codes.clone(), codes.clone(), codes.clone()
    zero[::100] = 0
    giant[5] *= 100
    copies[len(codes) // 100 :] = codes[:1]
    near = codes[:1] + 1e-3 * codes
    missing[::2] = float("nan")
    equal = codes[:1].expand_as(codes).contiguous()
    unit = {"dims": DIMS}
    raw: dict[str, Any] = {"l2_norm": False}
    cases = {
        "a hundredth of the rows zero": (zero, codes, unit),
        "99% of the codes equal": (rows, copies, unit),
        "all codes equal": (rows, equal, unit),
        "one code 100 times as long, without l2_norm": (rows, giant, raw),
        "codes close together": (rows, near, unit),
        "codes and rows close together, without l2_norm": (codes[:1] + 1e-3 * rows, near, raw),
    }
    if settings.device == "cuda":
        cases["half of the codes NaN"] = (rows, missing, unit)
    else:
        yield "half of the codes NaN: left out, the CPU refuses such a codebook"
    for name, (x, codebook, options) in cases.items():
        usual = _median(lambda options=options: nearest_code(rows, codes, **options), 5)
        this = _median(lambda x=x, c=codebook, o=options: nearest_code(x, c, **o), 3)
        yield f"{name}: {1e3 * this:.3f} ms, {this / usual:.1f} times the usual {1e3 * usual:.3f}"


def _median(call: Callable[[], object], rounds: int) -> float:
    call()
    return statistics.median(seconds(call) for _ in range(rounds))


def _copy_rate(device: str) -> float:
    """Bytes a second, read and written."""
    block = torch.ones(2**28, device=device)
    other = torch.empty_like(block)
    return 2 * block.nbytes / _median(lambda: other.copy_(block), 10)


def _graph(call: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # lazy state is made outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
    launched = _median(call, 20)
    line = f"{name}: {1e3 * launched:.4f} ms"
    if settings.device == "cuda" and detail:
        line += f", as a graph {1e3 * _median(_graph(call), 20):.4f} ms"
    yield line
    if settings.device == "cuda" and detail:
        yield from _kernels(call)


def measure(settings: Settings) -> Lines:
    device = settings.device
    copy = _copy_rate(device)
    yield f"copy: {copy / 1e9:.0f} GB/s read and written"
    codebook = settings.randn(settings.codes, DIM)
    for count in (8192, 23328):
        rows = settings.randn(count, DIM)
        call = lambda rows=rows: nearest_code(rows, codebook, DIMS)  # noqa: E731
        yield from _timed(settings, f"search, {count} rows, {settings.codes} codes", call, True)
        best = _median(_graph(call) if device == "cuda" else call, 20)
        work = 2 * count * settings.codes * DIM
        yield f"    {work / best / 1e12:.1f} TFLOP/s counted as 2 N K {DIM}"
        z, c = (torch.nn.functional.normalize(t, dim=1) for t in (rows, codebook))
        eager = _median(lambda z=z, c=c: (z @ c.T).argmax(1), 5)
        yield f"    product + argmax in float32: {1e3 * eager:.3f} ms, {eager / best:.1f} times"
    for pyramid, batch in (("B", 1), ("B", 32), ("XL", 32)):
        case = Settings(device, settings.codes, pyramid, batch, settings.seconds)
        quantizer = _quantizer(case, device)
        h, grad = (t.to(device) for t in _features(case))

        def forward(quantizer: MultiScaleQuantizer = quantizer, h: Tensor = h) -> object:
            with torch.no_grad():
                return quantizer.eval()(h)

        def both(
            quantizer: MultiScaleQuantizer = quantizer, h: Tensor = h, grad: Tensor = grad
        ) -> object:
            return _step(quantizer.train(), h, grad)

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
            took = _median(draw, 10)
            yield f"    logits read: {2 * logits.nbytes / took / copy:.0%} of copy"
        few = lambda draw=draw: draw(16)  # noqa: E731
        yield from _timed(settings, f"sampler, 16 rows of {dtype}", few, True)


MODES: dict[str, Callable[[Settings], Lines]] = {
    "smoke": smoke,
    "sanitize": sanitize,
    "agree": agree,
    "soak": soak,
    "threads": threads,
    "odd": odd,
    "time": measure,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("modes", nargs="+", choices=list(MODES), metavar="MODE")
    parser.add_argument("--out", type=Path, help="folder for MODE.txt; files there are kept")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--codes", type=int, default=32768, help="codebook size (default: 32768)")
    parser.add_argument("--pyramid", choices=list(PYRAMIDS), default="XL", help="(default: XL)")
    parser.add_argument(
        "--batch-size", "--batch", type=int, default=8, help="images a step (default: 8)"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of soak and threads")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu runs the same on the CPU")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        taken = [f"{mode}.txt" for mode in options.modes if (options.out / f"{mode}.txt").exists()]
        if taken:
            parser.error(f"{options.out} already has {', '.join(taken)}")
    settings = Settings(
        options.device, options.codes, options.pyramid, options.batch_size, options.seconds
    )
    run = machine.facts([])
    run["command"] = " ".join(["python -m benchmarks.gpu", *options.modes])
    run["load after"] = list(os.getloadavg())
    header = machine.describe(run, options.device)
    wrong = False
    for mode in options.modes:
        lines = [*header, ""]
        print(f"== {mode}", flush=True)
        torch.manual_seed(0)
        begin = time.monotonic()
        try:
            for line in MODES[mode](settings):
                print(line, flush=True)
                lines.append(line)
        except Wrong as error:
            wrong = True
            lines.append(f"WRONG: {error}")
            print(lines[-1], flush=True)
        lines.append(f"({time.monotonic() - begin:.0f} s)")
        if options.out:
            (options.out / f"{mode}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
