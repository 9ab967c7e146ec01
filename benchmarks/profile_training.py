"""Where the time of a tokenizer's training goes:

    python -m benchmarks.profile_training [--config FILE] [--out DIR] [key=value ...]

Trains as ``train/tokenizer.py`` would, some steps to warm up, some against the clock, some under
torch.profiler. Writes DIR/trace.json (for chrome://tracing or ui.perfetto.dev), and a table by part
of a step with throughput and peak memory as DIR/profile.txt and DIR/profile.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import commit, cpu_model
from tokenflow_ext.train.config import load_config, to_yaml
from tokenflow_ext.train.engine.distributed import processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.tasks.tokenizer import TokenizerTask

#: The ranges that training marks by record_function, in the order of a step.
PARTS = (
    "data wait",
    "teacher",
    "encoders",
    "quantizer",
    "decoders",
    "losses",
    "backward",
    "discriminator",
    "optimizer",
    "average",
)


def _exclusive(ranges: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(part, start, end) in microseconds, so that of nested ranges of a thread the inner counts."""
    pieces, stack = [], []

    def close(until: float) -> None:
        while stack and stack[-1][1] <= until:
            name, end, begin = stack.pop()
            pieces.append((name, begin, end))
            if stack:
                stack[-1][2] = end

    for event in sorted(ranges, key=lambda e: (e["ts"], -e["dur"])):
        close(event["ts"])
        if stack:
            pieces.append((stack[-1][0], stack[-1][2], event["ts"]))
        stack.append([event["name"], event["ts"] + event["dur"], event["ts"]])
    close(float("inf"))
    return pieces


def by_part(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of each part: ``host`` in the thread that trains, ``beside`` it in others (the
    one that reads ahead), ``device`` in the kernels that were launched meanwhile.

    Args:
        events: of a Chrome trace (``traceEvents``).
    """
    ranges = defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation" and event.get("name") in PARTS:
            ranges[event["tid"]].append(event)
    trains = next((t for t, r in ranges.items() if any(e["name"] == "optimizer" for e in r)), None)
    found = {part: {"host": 0.0, "beside": 0.0, "device": 0.0} for part in PARTS}
    pieces = {thread: _exclusive(marked) for thread, marked in ranges.items()}
    for thread, marked in pieces.items():
        for part, start, end in marked:
            found[part]["host" if thread == trains else "beside"] += (end - start) / 1e3
    # The backward pass launches from threads of its own while the thread that trains waits for it.
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            at = launched.get(event.get("args", {}).get("correlation"))
            for part, start, end in pieces.get(trains, ()) if at is not None else ():
                if start <= at < end:
                    found[part]["device"] += event["dur"] / 1e3
                    break
    return found


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    steps, wall = result["steps"], result["profiled_ms_per_step"]
    rows = [("part", "ms a step", "share", "beside, ms", "device, ms")]
    rest = wall
    for part, times in result["parts"].items():
        host, beside, device = (times[kind] / steps for kind in ("host", "beside", "device"))
        rest -= host
        if host or beside:
            share = f"{host / wall:.1%}" if host else ""
            rows.append((part, f"{host:.1f}", share, f"{beside:.1f}", f"{device:.1f}"))
    rows.append(("the rest", f"{rest:.1f}", f"{rest / wall:.1%}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"{wall:.1f} ms a step under the profiler, {result['ms_per_step']:.1f} ms without",
            f"{result['images_per_second']:.1f} img/s (batch {result['batch']}), peak memory "
            f"{result['peak_memory_gib']:.2f} GiB",
            f"{result['processes']} process(es) on {result['device']}, {result['threads']} "
            f"thread(s), torch {result['torch']}, commit {result['commit']}, load average "
            f"{result['load']:.1f}",
        ]
    )


def _steps(trainer: Trainer, count: int) -> float:
    """Milliseconds that a step takes, over ``count`` steps."""
    cuda = trainer.group.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        trainer.train_step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / count


def measure(config: Any, out: Path, steps: int, warmup: int) -> dict[str, Any]:
    """Profile a run; the first process writes what the module says."""
    with processes(config.device) as group:
        trainer = Trainer(config, group, TokenizerTask)
        trainer.prepare()
        if warmup:
            _steps(trainer, warmup)
        plain = _steps(trainer, steps)
        cuda = group.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        with profile(activities=activities, experimental_config=threads) as profiler:
            profiled = _steps(trainer, steps)
        trainer.stop_reading()
        result = {
            "steps": steps,
            "batch": config.optim.batch,
            "ms_per_step": plain,
            "profiled_ms_per_step": profiled,
            "images_per_second": config.optim.batch / plain * 1e3,
            "peak_memory_gib": group.peak_memory(),
            "processes": group.world,
            "device": torch.cuda.get_device_name(group.device) if cuda else cpu_model(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
            "load": os.getloadavg()[0],
            "config": to_yaml(config),
        }
        if group.first:
            out.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(out / "trace.json"))
            trace = json.loads((out / "trace.json").read_text(encoding="utf-8"))
            result["parts"] = by_part(trace["traceEvents"])
            (out / "profile.json").write_text(json.dumps(result, indent=2) + "\n")
            (out / "profile.txt").write_text(table(result) + "\n")
            print(table(result))
        return result


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_training", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", metavar="FILE", help="YAML configuration")
    parser.add_argument("--out", default="runs/profile", metavar="DIR", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=8, help="each, timed and profiled [8]")
    parser.add_argument("--warmup", type=int, default=3, help="steps before [%(default)s]")
    known, overrides = parser.parse_known_args(argv)
    if known.steps < 1 or known.warmup < 0:
        parser.error(
            f"--steps must be 1 or more and --warmup 0 or more, got {known.steps} and "
            f"{known.warmup}"
        )
    measure(load_config(known.config, overrides), Path(known.out), known.steps, known.warmup)


if __name__ == "__main__":
    main(sys.argv[1:])
