"""The profile of training: every part is found, nested and launched time is counted once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import profile_training

MICRO = Path(__file__).resolve().parents[1] / "train" / "micro.py"


def annotated(name: str, start: float, end: float, thread: int = 1) -> dict:
    return {"cat": "user_annotation", "name": name, "ts": start, "dur": end - start, "tid": thread}


def launched(number: int, at: float, took: float) -> list[dict]:
    link = {"correlation": number}
    return [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": at, "tid": 7, "args": link},
        {"cat": "kernel", "name": "k", "ts": at + 900, "dur": took, "tid": 3, "args": link},
    ]


def test_time_is_counted_once():
    events = [
        {"ph": "M", "name": "process_name"},
        annotated("data wait", 0, 5000),
        annotated("teacher", 1000, 4000),
        annotated("backward", 5000, 9000),
        annotated("optimizer", 9000, 9500),
        annotated("not a part", 0, 9500),
        annotated("teacher", 0, 2000, thread=2),
        *launched(1, 1500, 300),  # inside the teacher, which is inside the wait
        *launched(2, 6000, 700),
        *launched(3, 8999, 50),
        *launched(4, 20000, 80),  # after everything
        {"cat": "kernel", "name": "k", "ts": 0, "dur": 9, "tid": 3, "args": {"correlation": 99}},
    ]
    parts = profile_training.by_part(events)
    assert parts["data wait"] == {"host": 2.0, "beside": 0.0, "device": 0.0}
    assert parts["teacher"] == {"host": 3.0, "beside": 2.0, "device": 0.3}
    assert parts["backward"] == {"host": 4.0, "beside": 0.0, "device": 0.75}
    assert parts["optimizer"]["host"] == 0.5
    assert sum(times["host"] for times in parts.values()) == 9.5


def test_a_run_is_profiled(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("profiled_micro", MICRO)
    micro = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(micro)
    images = micro.draw_images(tmp_path / "images")
    settings = micro.overrides(tmp_path / "run", images, *micro.PIXEL_ONLY)
    adversarial = ("loss.gan=0.5", "loss.gan_start=0")
    out = tmp_path / "profile"
    arguments = ["--out", str(out), "--steps", "2", "--warmup", "1", *settings, *adversarial]
    profile_training.main(arguments)
    result = json.loads((out / "profile.json").read_text())
    for part, times in result["parts"].items():
        assert (sum(times.values()) > 0) == (part != "teacher"), part  # there is none
    host = sum(times["host"] for times in result["parts"].values()) / 2
    assert 0.7 * result["profiled_ms_per_step"] < host <= result["profiled_ms_per_step"]
    assert result["images_per_second"] == pytest.approx(4 / result["ms_per_step"] * 1e3)
    assert result["peak_memory_gib"] > 0.05
    text = (out / "profile.txt").read_text()
    assert text == capsys.readouterr().out
    assert "quantizer" in text
    assert "teacher" not in text
    assert json.loads((out / "trace.json").read_text())["traceEvents"]


def test_a_run_without_steps_is_refused(capsys):
    with pytest.raises(SystemExit):
        profile_training.main(["--steps", "0"])
    assert "--steps must be 1 or more" in capsys.readouterr().err
