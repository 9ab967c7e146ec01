"""Resuming: bit for bit, after a kill at any moment, and never from half a checkpoint."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch

from tokenflow_ext.train import tokenizer
from tokenflow_ext.train.engine import checkpoint


@pytest.mark.once
@pytest.mark.parametrize(
    "settings",
    [
        (),
        (
            "loss.gan=0.5",
            "loss.gan_start=2",
            "loss.gan_adaptive=yes",
            "optim.accumulate=2",
            "codebook.restart_every=2",
        ),
        ("optim.precision=bf16", "data.workers=1", "model.quantizer.codebook_update=ema"),
        ("optim.precision=fp16", "optim.schedule=constant", "model.quantizer.scale_drop=0.5"),
        (
            "model.quantizer.kind=var",
            "model.quantizer.l2_norm=no",
            "model.quantizer.phi_shared=3",
            "model.quantizer.scale_drop=0.5",
            "codebook.restart_every=2",
        ),
    ],
    ids=["plain", "adversarial", "bf16", "fp16", "var"],
)
def test_six_steps_are_three_and_three(micro, images, tmp_path, settings):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    tokenizer.main(micro.overrides(whole, images, *micro.PIXEL_ONLY, *settings))
    # The schedule must know of all six steps: the second half is lost, not missing.
    tokenizer.main(micro.overrides(halves, images, *micro.PIXEL_ONLY, *settings))
    last = checkpoint.available(halves / "checkpoints")[-1]
    assert last.name == "step_00000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    with (halves / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "kind"')  # a line that the killed process did not finish
    torch.manual_seed(99)  # nothing may depend on where the generators happen to be
    tokenizer.main([f"run={halves}", "--resume"])  # the folder holds its configuration
    micro.assert_same_end(whole, halves)


def test_a_finished_run_resumes_to_its_summary(micro, images, tmp_path, capsys):
    run = tmp_path / "run"
    tokenizer.main(micro.overrides(run, images, *micro.PIXEL_ONLY))
    before = json.loads((run / "summary.json").read_text())
    tokenizer.main([f"run={run}", "--resume"])
    assert json.loads((run / "summary.json").read_text()) == before
    assert "continuing from" in capsys.readouterr().out


def test_resuming_a_run_without_a_checkpoint_starts_it(micro, images, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    tokenizer.main([*micro.overrides(run, images, *micro.PIXEL_ONLY), "--resume"])
    assert checkpoint.available(run / "checkpoints")


@pytest.mark.once
def test_killed_while_writing(micro, images, tmp_path):
    """SIGKILL at different places of a write; each resumed run starts from a whole checkpoint, no
    more than one interval back, and the end is that of a run that was never killed."""
    settings = (*micro.PIXEL_ONLY, "optim.steps=8", "output.checkpoint_every=2", "output.keep=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tokenizer.main(micro.overrides(whole, images, *settings))
    script = micro.slow_script(tmp_path, tokenizer.main, 0.2)
    arguments = [*micro.overrides(killed, images, *settings), "--resume"]

    finished = []
    for victim in ("training.pt", ".part", None):  # .part: the first file of a checkpoint
        process = micro.launch(arguments, script=script)
        seen = set()
        for line in process.stdout:
            folder, _, file = line.partition("/.writing_")[2].strip().partition("/")
            if victim and folder and file.endswith(victim):
                # The second write of this process: one interval was saved, one is under way.
                seen.add(folder)
                if len(seen) == 2:
                    time.sleep(0.05)
                    process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        available = checkpoint.available(killed / "checkpoints")
        for path in available:
            checkpoint.verify(path)
        steps = [int(path.name.removeprefix("step_")) for path in available]
        if process.returncode == -signal.SIGKILL:
            finished.append(steps[-1])
            assert list((killed / "checkpoints").glob(".writing_*"))
    assert finished == [2, 4]  # every process got one interval further before it was killed
    micro.assert_same_end(whole, killed)


@pytest.mark.once
def test_killed_at_any_moment(micro, images, tmp_path):
    """SIGKILL after times that no one chose with care; in the end every step has been made."""
    settings = (
        *micro.PIXEL_ONLY,
        "optim.steps=60",
        "output.checkpoint_every=1",
        "output.eval_every=60",
    )
    run = tmp_path / "run"
    arguments = [*micro.overrides(run, images, *settings), "--resume"]
    kills, reached = 0, 0
    for delay in (0.05, 0.34):
        process = micro.launch(arguments)
        deadline = time.monotonic() + 60
        # Wait until it trains (a checkpoint of its own), then a little.
        while time.monotonic() < deadline and process.poll() is None:
            available = checkpoint.available(run / "checkpoints")
            if available and int(available[-1].name.removeprefix("step_")) > reached:
                break
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        newest = checkpoint.available(run / "checkpoints")[-1]
        checkpoint.verify(newest)
        reached = int(newest.name.removeprefix("step_"))
    assert kills == 2
    micro.finish(micro.launch(arguments))
    assert checkpoint.available(run / "checkpoints")[-1].name == "step_00000060"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == list(range(1, 61))
