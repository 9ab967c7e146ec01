"""The program for a GPU's first minutes: its modes run on the CPU and say what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

SMALL = [
    "--device",
    "cpu",
    "--codes",
    "600",
    "--pyramid",
    "tiny",
    "--batch-size",
    "2",
    "--seconds",
    "0.1",
]


@pytest.mark.parametrize("mode", ["smoke", "agree", "soak", "threads", "odd"])
def test_modes_run_on_the_cpu(mode: str, tmp_path: Path) -> None:
    assert gpu.main([mode, *SMALL, "--out", str(tmp_path)]) == 0
    text = (tmp_path / f"{mode}.txt").read_text()
    assert "torch" in text
    assert "WRONG" not in text


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "smoke.txt").write_text("mine")
    with pytest.raises(SystemExit):
        gpu.main(["smoke", *SMALL, "--out", str(tmp_path)])
    assert (tmp_path / "smoke.txt").read_text() == "mine"


def _off_by_a_bit(times: int) -> Callable[..., dict[str, torch.Tensor]]:
    right, calls = gpu.step, iter(range(1000))

    def step(*arguments: object) -> dict[str, torch.Tensor]:
        found = right(*arguments)
        if next(calls) >= times:
            found["quantized"] = found["quantized"] + 1e-4
        return found

    return step


@pytest.mark.parametrize("mode", ["agree", "soak"])
def test_a_wrong_result_is_told(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "step", _off_by_a_bit(1))
    assert gpu.main([mode, *SMALL]) == 1
    assert "WRONG: quantized" in capsys.readouterr().out


def test_threads_that_draw_something_else_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = gpu.sample_top_k_top_p, iter(range(100000))

    def draws(logits: torch.Tensor, **options: object) -> torch.Tensor:
        return right(logits, **options) + (next(calls) >= 4)

    monkeypatch.setattr(gpu, "sample_top_k_top_p", draws)
    assert gpu.main(["threads", *SMALL]) == 1
    assert "other draws than one thread's" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["smoke"])
    assert "--device cpu" in capsys.readouterr().err
