"""What to run in the first minutes with a GPU: `python -m benchmarks.gpu MODE... [--out DIR]`.

    smoke      every operator once, on ragged sizes; small enough for compute-sanitizer
    sanitize   smoke under the four tools of compute-sanitizer, one process each, at the same time
    agree      a training step at full size against the CPU kernels on the same inputs
    soak       the same step again and again beside matrix products: every bit must stay
    threads    samplers of different sizes from several threads at once
    odd        inputs that make many codes tie, against ordinary inputs of the same size
    time       graphs and calls of the search, the pyramids and the sampler, kernel by kernel
    profile    the kernels that matter under Nsight Compute, and whether they are bound as claimed
    once       the calls that `profile` looks at, each once

Each mode prints its lines and, with --out, writes them to DIR/MODE.txt; `profile` leaves ncu's
report and its CSV beside them. A mode that finds something wrong makes the program end with status
1. All but `sanitize` and `profile` run on the CPU too (--device cpu). docs/measurements.md says
which claims each mode settles.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_profile, machine
from benchmarks.cases import DIMS, PYRAMIDS
from benchmarks.gpu_calls import DIM, Lines, Settings, Wrong, features, quantizer_for, step
from benchmarks.gpu_time import measure
from benchmarks.timing import median
from tokenflow_ext import (
    MultiScaleQuantizer,
    nearest_code,
    sample_code,
    sample_top_k_top_p,
    segment_sum,
)
from tokenflow_ext.var import VarQuantizer

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


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
    h, grad = features(settings)
    expected = step(quantizer_for(settings, "cpu"), h, grad)
    found = step(
        quantizer_for(settings, settings.device), *(t.to(settings.device) for t in (h, grad))
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
    quantizer = quantizer_for(settings, settings.device)
    h, grad = (t.to(settings.device) for t in features(settings))
    expected = {name: value.clone() for name, value in step(quantizer, h, grad).items()}
    other = torch.randn(2048, 2048, device=settings.device)
    side = torch.cuda.Stream() if settings.device == "cuda" else None
    end, steps = time.monotonic() + settings.seconds, 0
    while time.monotonic() < end or steps == 0:
        with torch.cuda.stream(side) if side else torch.no_grad():
            other @ other
        for name, value in step(quantizer, h, grad).items():
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
        usual = median(lambda options=options: nearest_code(rows, codes, **options), 5)
        this = median(lambda x=x, c=codebook, o=options: nearest_code(x, c, **o), 3)
        yield f"{name}: {1e3 * this:.3f} ms, {this / usual:.1f} times the usual {1e3 * usual:.3f}"


MODES: dict[str, Callable[[Settings], Lines]] = {
    "smoke": smoke,
    "sanitize": sanitize,
    "agree": agree,
    "soak": soak,
    "threads": threads,
    "odd": odd,
    "time": measure,
    "profile": gpu_profile.profile,
    "once": gpu_profile.once,
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
        taken = sorted(
            file.name for mode in options.modes for file in options.out.glob(f"{mode}.*")
        )
        if taken:
            parser.error(f"{options.out} already has {', '.join(taken)}")
    settings = Settings(
        options.device,
        options.codes,
        options.pyramid,
        options.batch_size,
        options.seconds,
        options.out,
    )
    run = machine.facts([])
    search = os.environ.get("TOKENFLOW_CUDA_SEARCH")
    prefix = f"TOKENFLOW_CUDA_SEARCH={search} " if search else ""
    run["command"] = " ".join([f"{prefix}python -m benchmarks.gpu", *options.modes])
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
