"""Draws held-out crops of photographs, each decoded from more and more of its scales.

    make train
    python examples/draw_scales.py runs/tokenizer

The crops are of the built-in photographs, from the part that the run was not trained on.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from tokenflow_ext.errors import ConfigError, OutputError
from tokenflow_ext.train.config import DataConfig
from tokenflow_ext.train.data import held_out_crops, split
from tokenflow_ext.train.data.image_files import to_pixels
from tokenflow_ext.train.engine.checkpoint import load_tokenizer
from tokenflow_ext.train.engine.messages import ending_in_one_line

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("weights", help="a run, a checkpoint, or an original file")
parser.add_argument("--out", type=Path, default=Path("scales.png"))
arguments = parser.parse_args()

with ending_in_one_line(), torch.no_grad():
    if arguments.out.exists():
        raise OutputError(f"{arguments.out} is there already: name another --out")
    tokenizer, _ = load_tokenizer(arguments.weights)
    if not tokenizer.config.pixel.enabled:
        raise ConfigError(f"{arguments.weights} decodes no images: its pixel.enabled is false")
    _, pictures = split(DataConfig())
    crops = held_out_crops(pictures, tokenizer.config.image_size, DataConfig().held_out_crops)
    columns = {"original": crops[[15, 22, 37, 87]]}
    tokens = tokenizer.encode(columns["original"])
    for upto in range(1, len(tokenizer.quantizer.scales) + 1):
        used = sum(tokenizer.quantizer.tokens_per_scale[:upto])
        columns[f"{used} token{'s' if used > 1 else ''}"] = tokenizer.decode(tokens, upto)[0]
    shape = len(columns["original"]), len(columns)
    figure = Figure(figsize=(1.3 * shape[1], 1.3 * shape[0] + 0.3), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False)
    for x, (title, images) in enumerate(columns.items()):
        grid[0, x].set_title(title, fontsize=10)
        for axes, pixels in zip(grid[:, x], to_pixels(images), strict=True):
            axes.imshow(pixels)
            axes.axis("off")
    figure.savefig(arguments.out, format="png", dpi=100)
    print(f"{shape[0]} crops in {shape[1]} columns: {arguments.out}")
