"""A tokenizer small enough to train in a test, and the command that trains it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train" / "tokenizer.py"


def overrides(run: Path, images: Path, *more: str) -> list[str]:
    """Settings of a run of a few steps on 32 px crops, with a codebook of 64."""
    return [
        f"run={run}",
        f"data.path={images}",
        "data.held_out_crops=8",
        "optim.steps=6",
        "optim.batch=4",
        "optim.warmup=2",
        "output.log_every=1",
        "output.eval_every=3",
        "output.picture_every=100",
        "output.checkpoint_every=3",
        "output.tensorboard=no",
        "output.progress=no",
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


def draw_images(folder: Path, count: int = 3, side: int = 80) -> Path:
    """Smooth coloured pictures, each different."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:side, 0 : side + 20] / side
    for i in range(count):
        waves = [np.sin((3 + i) * x + c) + np.cos((2 + c) * y * (i + 1)) for c in range(3)]
        pixels = (np.stack(waves, axis=-1) * 60 + 128).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{i}.png")
    return folder


def environment() -> dict[str, str]:
    """The environment for training in another process: one thread, no group of processes."""
    left_out = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    return kept | {"OMP_NUM_THREADS": "1"}


def launch(arguments: list[str], processes: int = 0, script: Path = SCRIPT) -> subprocess.Popen:
    """Start training, under torchrun where ``processes`` is not 0."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, seconds: float = 150) -> str:
    """The output of a process that must succeed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{output}") from None
    assert process.returncode == 0, output
    return output
