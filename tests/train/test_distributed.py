"""Two processes under torchrun give what one process gives with the joined batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tokenflow_ext.models import WeightsError
from tokenflow_ext.models.teachers import find_efficientnet_lite0
from tokenflow_ext.train import checkpoint

TOGETHER = Path(__file__).with_name("together.py")
STEPS = {
    "adversarial": ("loss.gan=0.5", "loss.gan_start=0"),
    "stylegan": (
        "loss.gan=0.5",
        "loss.gan_start=0",
        "loss.discriminator=stylegan",
        "loss.discriminator_channels=8",
        "loss.discriminator_loss=vanilla",
        "loss.generator_loss=non-saturating",
    ),
    "accumulated": ("optim.accumulate=2",),
    "ema": ("model.quantizer.codebook_update=ema",),
    "var": (
        "model.quantizer.kind=var",
        "model.quantizer.l2_norm=no",
        "model.quantizer.phi_shared=0",
    ),
    "semantic": (
        "model.pixel.enabled=no",
        "model.semantic.tower.kind=efficientnet_lite0",
        "model.teacher.kind=efficientnet_lite0",
    ),
}
try:
    find_efficientnet_lite0()
except WeightsError:
    del STEPS["semantic"]


@pytest.fixture(scope="module")
def ends(micro, images, tmp_path_factory) -> Path:
    """A folder with what two processes, and one, made of the same steps and runs."""
    folder = tmp_path_factory.mktemp("distributed")

    def arguments(run: str, *more: str) -> list[str]:
        return micro.overrides(folder / run, images, *micro.PIXEL_ONLY, *more)

    steps = {
        name: arguments(
            name,
            "model.quantizer.scale_drop=0",  # each process drops scales of its own
            "codebook.kmeans_batches=0",  # k-means draws its start per process
            "optim.max_grad_norm=1e9",
            "optim.batch=8",
            *settings,
        )
        for name, settings in STEPS.items()
    }
    # Phases that differ in what they use: dropped scales, a discriminator that starts on the way,
    # a loss that is off, restarts, a held-out set that cannot be dealt out evenly.
    phases = (
        "model.quantizer.scale_drop=0.5",
        "codebook.restart_every=2",
        "loss.gan=0.5",
        "loss.gan_start=2",
        "loss.gan_adaptive=yes",
        "loss.vq=0",
        "optim.accumulate=2",
        "data.held_out_crops=3",
    )
    processes = []
    for world in (1, 2):
        plan = {
            "program": "tokenizer",
            "steps": {str(folder / f"{name}{world}.pt"): given for name, given in steps.items()},
            "runs": [arguments(run, *phases) for run in ("whole", "halves")] if world == 2 else [],
        }
        file = folder / f"plan{world}.json"
        file.write_text(json.dumps(plan))
        processes.append(micro.launch([str(file)], processes=world, script=TOGETHER))
    for process in processes:
        output = micro.finish(process)
    assert output.count("PSNR") == 3  # one process speaks, once a run
    return folder


@pytest.mark.parametrize("name", STEPS)
def test_statistics_and_gradients_are_those_of_the_joined_batch(micro, ends, name):
    alone, shared = (torch.load(ends / f"{name}{n}.pt", weights_only=True) for n in (1, 2))
    assert alone["usage"].sum() > 0
    assert torch.equal(alone["usage"], shared["usage"])
    for a, b in zip(alone["codebooks"], shared["codebooks"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    micro.assert_same_step(alone, shared)


def test_two_processes_resume_bit_for_bit(ends):
    runs = [ends / "whole", ends / "halves"]
    last = [checkpoint.load(checkpoint.available(run / "checkpoints")[-1]) for run in runs]
    assert len(last[0]["random"]) == 2
    for name, value in last[0]["model"].items():
        assert torch.equal(value, last[1]["model"][name]), name
    losses = [
        [json.loads(line).get("total") for line in (run / "log.jsonl").read_text().splitlines()]
        for run in runs
    ]
    assert losses[0] == losses[1]


def test_the_script_under_torchrun(micro, images, tmp_path):
    run = tmp_path / "run"
    arguments = micro.overrides(run, images, *micro.PIXEL_ONLY, "optim.steps=1")
    micro.finish(micro.launch(arguments, processes=1))
    assert (run / "summary.json").is_file()
