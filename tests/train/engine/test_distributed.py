"""Two processes under torchrun give what one process gives with the joined batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weights import LITE0_MISSING

from tokenflow_ext.train.engine import checkpoint

pytestmark = pytest.mark.once

TOGETHER = Path(__file__).parents[1] / "together.py"
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
    "fsdp": (
        "parallel=fsdp",
        "optim.accumulate=2",
        "loss.gan=0.5",
        "loss.gan_start=0",
    ),
    "fsdp_ema": ("parallel=fsdp", "model.quantizer.codebook_update=ema", "checkpointing=yes"),
    "fsdp_tower": (  # a semantic branch, whose decoder gets no gradient from the pixels' losses
        "parallel=fsdp",
        "checkpointing=yes",
        "pretrained_tower=no",
        "model.semantic.tower.kind=clip",
        "model.semantic.tower.image_size=32",
        "model.semantic.tower.patch_size=8",
        "model.semantic.tower.width=16",
        "model.semantic.tower.depth=2",
        "model.semantic.tower.heads=2",
        "model.semantic.tower.mlp_width=32",
        "model.semantic.tower.input_scale=1",
        "model.semantic.frozen=no",
        "optim.lr_scale.semantic_tower=0.1",
    ),
}
if LITE0_MISSING is not None:
    del STEPS["semantic"]
# Three steps of a run one way, three the other.
WAYS = {"ddp": ("ddp", "ddp"), "ddp_fsdp": ("ddp", "fsdp"), "fsdp_ddp": ("fsdp", "ddp")}


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
    # k-means at the start, restarts on the way.
    changing = ("optim.schedule=constant", "codebook.restart_every=2", "codebook.restart_until=1")
    # With the adaptive weight, which takes gradients of its own at a layer of split weights.
    half = (
        "optim.precision=bf16",
        "optim.accumulate=2",
        "optim.steps=4",
        "loss.gan=0.5",
        "loss.gan_start=2",
    )
    processes = []
    for world in (1, 2):
        plan = {
            "program": "tokenizer",
            "steps": {str(folder / f"{name}{world}.pt"): given for name, given in steps.items()},
            "halved": [],
            "runs": [],
        }
        if world == 2:
            plan["halved"] = [arguments(run, *phases) for run in ("whole", "halves")]
            plan["runs"] = [
                arguments(run, *changing, f"parallel={way}", f"optim.steps={until}")
                for run, ways in WAYS.items()
                for way, until in zip(ways, (3, 6), strict=True)
            ]
            plan["runs"] += [
                arguments(f"half_{w}", f"parallel={w}", *half) for w in ("ddp", "fsdp")
            ]
        file = folder / f"plan{world}.json"
        file.write_text(json.dumps(plan))
        processes.append(micro.launch([str(file)], processes=world, script=TOGETHER))
    for process in processes:
        output = micro.finish(process)
    assert output.count("PSNR") == 3 + 2 * len(WAYS) + 2  # one process speaks, once a run
    return folder


@pytest.mark.parametrize("name", STEPS)
def test_statistics_and_gradients_are_those_of_the_joined_batch(micro, ends, name):
    alone, shared = (torch.load(ends / f"{name}{n}.pt", weights_only=True) for n in (1, 2))
    assert alone["usage"].sum() > 0
    assert torch.equal(alone["usage"], shared["usage"])
    micro.assert_same_step(alone, shared)
    for key, value in alone["averages"].items():
        if "codebooks" in key or "fsdp" in name:
            torch.testing.assert_close(value, shared["averages"][key], rtol=1e-3, atol=2e-5)
    total = alone["sizes"][0]
    if "fsdp" in name:
        codebooks = sum(v.numel() for k, v in alone["averages"].items() if "codebooks" in k)
        assert sum(shared["sizes"]) == total + codebooks
        assert max(shared["sizes"]) < 0.6 * total + codebooks
    else:
        assert shared["sizes"] == [total, total]


@pytest.mark.parametrize("name", ["ddp_fsdp", "fsdp_ddp"])
def test_a_checkpoint_serves_every_way_of_splitting(ends, name):
    newest = [checkpoint.available(ends / run / "checkpoints")[-1] for run in ("ddp", name)]
    assert newest[0].name == newest[1].name == "step_00000006"
    states = [checkpoint.load(path) for path in newest]
    weights = [load_file(path / "model.safetensors") for path in newest]
    for one, other in (weights, [state["model"] for state in states]):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4, msg=key)
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys()
    for index, values in moments[0].items():
        assert values["exp_avg"].shape == moments[1][index]["exp_avg"].shape


def test_split_weights_in_half_precision_with_an_adaptive_weight(ends):
    runs = []
    for way in ("ddp", "fsdp"):
        lines = (ends / f"half_{way}" / "log.jsonl").read_text().splitlines()
        runs.append([r for r in map(json.loads, lines) if r["kind"] == "train"])
        assert (ends / f"half_{way}" / "pictures" / "final.png").is_file()
    assert "discriminator" in runs[0][-1]
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys()
        for key in ("total", "generator", "l2", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=2e-2), key


def test_the_script_under_torchrun(micro, images, tmp_path):
    run = tmp_path / "run"
    arguments = micro.overrides(run, images, *micro.PIXEL_ONLY, "optim.steps=1")
    micro.finish(micro.launch(arguments, processes=1))
    assert (run / "summary.json").is_file()
