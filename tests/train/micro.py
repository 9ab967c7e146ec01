"""Models small enough to train in a test, the commands that train them, and how runs compare."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchrun
from PIL import Image, ImageColor
from safetensors.torch import load_file

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.config import load_config
from tokenflow_ext.train.engine import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train" / "tokenizer.py"
TEXT_SCRIPT = ROOT / "train" / "text_to_image.py"
DECODER_SCRIPT = ROOT / "train" / "decoder.py"
VAR_SCRIPT = ROOT / "train" / "var.py"
UNDERSTANDING_SCRIPT = ROOT / "train" / "understanding.py"
TOGETHER = Path(__file__).with_name("together_models.py")
# A run's name and more settings, to its command line.
Arguments = Callable[..., list[str]]


# A run of a few steps that writes little.
SHORT = (
    "optim.steps=6",
    "optim.batch=4",
    "optim.warmup=2",
    "output.log_every=1",
    "output.eval_every=3",
    "output.picture_every=100",
    "output.checkpoint_every=3",
    "output.tensorboard=no",
    "output.progress=no",
)


def overrides(run: Path, images: Path, *more: str) -> list[str]:
    """Settings of a run of a few steps on 32 px crops, with a codebook of 64."""
    return [
        f"run={run}",
        f"data.path={images}",
        "data.held_out_crops=8",
        *SHORT,
        "codebook.kmeans_batches=2",
        "codebook.kmeans_iterations=2",
        "model.image_size=32",
        "model.pixel.channels=8",
        "model.pixel.multipliers=[1,1,2,2]",
        "model.pixel.patch=1",
        "model.pixel.z_channels=8",
        "model.pixel.groups=4",
        "model.semantic.decoder_width=16",
        "model.semantic.decoder_depth=1",
        "model.semantic.decoder_heads=2",
        "model.semantic.decoder_grid=4",
        "model.quantizer.codebook_size=64",
        "model.quantizer.scales=[1,2,4]",
        *more,
    ]


# Without the semantic branch: no pretrained file needed, and nothing but the pixel branch to run.
PIXEL_ONLY = ("model.semantic.tower.kind=none", "model.teacher.kind=none")


def text_overrides(run: Path, tokenizer: Path, pairs: Path, *more: str) -> list[str]:
    """Settings of a text-to-image run of a few steps over the tokenizer of :func:`overrides`."""
    return [
        f"run={run}",
        f"tokenizer={tokenizer}",
        f"data.path={pairs}",
        "data.evaluated=6",
        *SHORT,
        "output.pictures=2",
        "model.backbone.hidden_size=32",
        "model.backbone.intermediate_size=64",
        "model.backbone.num_hidden_layers=2",
        "model.backbone.num_attention_heads=2",
        "model.vocabulary=300",
        "model.prompt_length=6",
        *more,
    ]


def var_overrides(run: Path, tokenizer: Path, pictures: Path, *more: str) -> list[str]:
    """Settings of a run of VAR of a few steps over the tokenizer of :func:`overrides`."""
    return [
        f"run={run}",
        f"tokenizer={tokenizer}",
        f"data.path={pictures}",
        "data.evaluated=6",
        *SHORT,
        "output.pictures=2",
        "model.depth=2",
        "model.width=32",
        "model.heads=2",
        *more,
    ]


def understanding_overrides(run: Path, tokenizer: Path, questions: Path, *more: str) -> list[str]:
    """Settings of an understanding run of a few steps over the tokenizer of :func:`overrides`."""
    return [
        f"run={run}",
        f"tokenizer={tokenizer}",
        f"data.path={questions}",
        "data.evaluated=6",
        "data.system=''",
        *SHORT,
        "output.pictures=2",
        "model.backbone.hidden_size=32",
        "model.backbone.intermediate_size=64",
        "model.backbone.num_hidden_layers=2",
        "model.backbone.num_attention_heads=2",
        "model.vocabulary=300",
        *more,
    ]


def unified_overrides(
    run: Path, tokenizer: Path, questions: Path, pairs: Path, *more: str
) -> list[str]:
    """Settings of a run both ways of a few steps over the tokenizer of :func:`overrides`."""
    drawing = (f"drawing.path={pairs}", "drawing.evaluated=6", "model.prompt_length=6")
    return [*understanding_overrides(run, tokenizer, questions), *drawing, *more]


def decoder_overrides(run: Path, tokenizer: Path, images: Path, *more: str) -> list[str]:
    """Settings of a few steps of a pixel decoder over the tokenizer of :func:`overrides`."""
    given = (f"run={run}", f"init={tokenizer}", f"data.path={images}", "data.held_out_crops=8")
    return [*given, *SHORT, *more]


def save_tokenizer(folder: Path, images: Path) -> Path:
    """An image tokenizer of :func:`overrides` that was never trained."""
    config = load_config(None, overrides(folder, images, *PIXEL_ONLY))
    torch.manual_seed(0)
    return TokenFlowTokenizer(config.model).save_pretrained(folder)


COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("disc", "square")


def draw_pairs(folder: Path) -> Path:
    """A dozen pictures of coloured shapes, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:32, 0:32] - 15.5
    lines = []
    for colour in COLOURS:
        for shape in SHAPES:
            inside = (x * x + y * y < 150) if shape == "disc" else (abs(x) < 9) & (abs(y) < 9)
            pixels = np.full((32, 32, 3), 128, np.uint8)
            pixels[inside] = ImageColor.getrgb(colour)
            name = f"{colour}_{shape}.png"
            Image.fromarray(pixels).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": f"A {colour} {shape}. On grey."}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def sort_into_classes(pairs: Path, folder: Path) -> Path:
    """The pictures of :func:`draw_pairs` in a folder for each shape."""
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour}_{shape}.png"
            (folder / shape).mkdir(parents=True, exist_ok=True)
            (folder / shape / name).write_bytes((pairs / name).read_bytes())
    return folder


def ask_about(pairs: Path, file: Path) -> Path:
    """Questions about the pictures of :func:`draw_pairs`, of one turn and of two, and one without a
    picture."""
    entries = []
    for colour in COLOURS:
        for shape in SHAPES:
            said = [("<image>\nWhat colour is it?", colour)]
            if shape == "disc":
                said.append(("And its shape?", shape))
            turns = [
                {"from": role, "value": value}
                for question, answer in said
                for role, value in (("human", question), ("gpt", answer))
            ]
            name = f"{colour}_{shape}.png"
            caption = f"A {colour} {shape}. On grey."
            entries.append(
                {"image": name, "caption": caption, "kind": shape, "conversations": turns}
            )
    greeting = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hello to you."}]
    entries.append({"conversations": greeting})
    for name in {entry["image"] for entry in entries if "image" in entry}:
        (file.parent / name).write_bytes((pairs / name).read_bytes())
    file.write_text(json.dumps(entries))
    return file


def draw_images(folder: Path, count: int = 3, side: int = 80) -> Path:
    """Smooth coloured pictures, each different."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:side, 0 : side + 20] / side
    for i in range(count):
        waves = [np.sin((3 + i) * x + c) + np.cos((2 + c) * y * (i + 1)) for c in range(3)]
        pixels = (np.stack(waves, axis=-1) * 60 + 128).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{i}.png")
    return folder


def launch(arguments: list[str], processes: int = 0, script: Path = SCRIPT) -> subprocess.Popen:
    """Start training, under torchrun where ``processes`` is not 0."""
    return torchrun.launch(script, arguments, processes)


finish = torchrun.finish


COSTS = {"images_per_second", "peak_memory_gib", "seconds"}


def flatten(value, path=""):
    """(path, leaf) of every leaf in nested containers."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flatten(item, f"{path}.{i}")
    else:
        yield path, value


def assert_same_step(alone, shared):
    """What together.py saw of a step on one process and on two: the joined batch's, to rounding."""
    assert alone["gradients"].keys() == shared["gradients"].keys()
    for key, gradient in alone["gradients"].items():
        torch.testing.assert_close(
            gradient, shared["gradients"][key], rtol=1e-4, atol=1e-6, msg=key
        )
    for kind in ("values", "held_out"):
        assert alone[kind].keys() == shared[kind].keys()
        for key, value in alone[kind].items():
            assert shared[kind][key] == pytest.approx(value, rel=1e-3), key
    first, second = shared["checksums"]
    assert first == second  # both processes hold the same weights


def assert_same_end(one, other):
    """Both runs' last checkpoints and logs agree in every bit that is no cost."""
    newest = [checkpoint.available(run / "checkpoints")[-1] for run in (one, other)]
    assert newest[0].name == newest[1].name
    states = [dict(flatten(checkpoint.load(path))) for path in newest]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        if key in (".seconds", ".config"):
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][key]), key
        else:
            assert value == states[1][key], key
    averages = [load_file(path / "model.safetensors") for path in newest]
    assert averages[0].keys() == averages[1].keys()
    for key, value in averages[0].items():
        assert torch.equal(value, averages[1][key]), key
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in COSTS}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (one, other)
    ]
    assert logs[0] == logs[1]


def assert_halves_are_whole(train: Callable[..., None], given: Arguments, folder: Path) -> None:
    """Six steps end as three do that are gone on from.

    Args:
        train: the main of a trainer's module.
        given: command lines of runs below the folder.
    """
    whole, halves = folder / "whole", folder / "halves"
    # The schedule must know of all six steps: the second half is lost, not missing.
    for run in (whole, halves):
        train(given(run.name))
    last = checkpoint.available(halves / "checkpoints")[-1]
    assert last.name == "step_00000006"
    shutil.rmtree(last)
    torch.manual_seed(99)  # nothing may depend on where the generators happen to be
    train([f"run={halves}", "--resume"])  # the folder holds its configuration
    assert_same_end(whole, halves)


# Training whose files reach the disk slowly, so that a kill lands inside a write.
_SLOW = """
import sys, time
import tokenflow_ext.models.serialization.files as files
flush = files.flush
def slow(path):
    print("writing", path, flush=True)
    time.sleep({seconds})
    flush(path)
files.flush = slow
from {module} import main
main(sys.argv[1:])
"""


def slow_script(folder: Path, train: Callable[..., None], seconds: float) -> Path:
    """A script like the trainer's, for which writing a file takes so long and says so."""
    script = folder / "slow.py"
    script.write_text(_SLOW.format(seconds=seconds, module=train.__module__))
    return script


def assert_a_kill_costs_an_interval(
    train: Callable[..., None], given: Arguments, folder: Path, script: Path
) -> None:
    """The second checkpoint is cut off; the run goes on from the first to the same end.

    Args:
        train, given: see :func:`assert_halves_are_whole`.
        script: the trainer's own.
    """
    settings = ("optim.steps=6", "output.checkpoint_every=2")
    train(given("whole", *settings))
    resumed = [*given("killed", *settings), "--resume"]
    process = launch(resumed, script=slow_script(folder, train, 0.1))
    for line in process.stdout:
        if "/.writing_00000004" in line and "training.pt" in line:
            process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    run = folder / "killed"
    assert [p.name for p in checkpoint.available(run / "checkpoints")] == ["step_00000002"]
    finish(launch(resumed, script=script))
    assert_same_end(folder / "whole", run)


def train_together(
    folder: Path,
    task: str,
    given: Arguments,
    steps: Mapping[str, Sequence[str]],
    runs: Sequence[Sequence[list[str]]] = ((), ()),
) -> Path:
    """Two steps of each name's settings on one process and on two, left in NAME1.pt and NAME2.pt;
    and runs of one process, and of two. Gives the folder.

    Args:
        task: of together_models.py.
        given: command lines of runs below the folder.
    """
    processes = []
    for world, more in enumerate(runs, 1):
        plan = {
            "task": task,
            "steps": {str(folder / f"{n}{world}.pt"): given(n, *s) for n, s in steps.items()},
            "runs": list(more),
        }
        file = folder / f"plan{world}.json"
        file.write_text(json.dumps(plan))
        processes.append(launch([str(file)], processes=world, script=TOGETHER))
    for process in processes:
        finish(process)
    return folder


def split_otherwise(given: Arguments, run: str, ways: Sequence[str], *more: str) -> list[list[str]]:
    """Three steps of a run split one way, and three more the other way."""
    return [
        given(run, *more, f"parallel={way}", f"optim.steps={steps}")
        for way, steps in zip(ways, (3, 6), strict=True)
    ]


def assert_joined_batch(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process and two left of a name's steps are alike, to rounding. Gives both."""
    alone, shared = (torch.load(folder / f"{name}{n}.pt", weights_only=True) for n in (1, 2))
    for kind in ("gradients", "weights"):
        assert alone[kind].keys() == shared[kind].keys()
        for key, value in alone[kind].items():
            torch.testing.assert_close(value, shared[kind][key], rtol=1e-3, atol=2e-5, msg=key)
    for a, b in zip(alone["losses"], shared["losses"], strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for key, value in alone["evaluated"].items():
        assert shared["evaluated"][key] == pytest.approx(value, rel=1e-3), key
    return alone, shared


def assert_split(name: str, alone: dict[str, Any], shared: dict[str, Any]) -> None:
    """Every process holds all weights with ddp, and its part of them else."""
    total = alone["sizes"][0]
    if name == "ddp":
        assert shared["sizes"] == [total, total]
    else:
        assert sum(shared["sizes"]) == total
        assert max(shared["sizes"]) < 0.6 * total
