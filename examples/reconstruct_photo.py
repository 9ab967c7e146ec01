"""Tokenizes photographs, decodes them scale by scale, and draws the result as one picture.

    make train
    python examples/reconstruct_photo.py [PHOTO ...] --checkpoint runs/tokenizer

Without a photograph it takes parts of the built-in ones that were held out of training. The picture
in the README is made that way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from tokenflow_ext.train.config import DataConfig
from tokenflow_ext.train.data import crops
from tokenflow_ext.train.data.image_files import read_square, to_pixels
from tokenflow_ext.train.engine.checkpoint import load_tokenizer

TILE, GAP, HEADER = 128, 4, 24  # pixels


def images_to_show(photos: list[Path], numbers: list[int], size: int) -> torch.Tensor:
    """[N, 3, size, size] in [-1, 1]: the photographs' middle squares, or held-out crops."""
    if photos:
        return torch.stack([read_square(photo, size) for photo in photos])
    config = DataConfig()
    _, held_out = crops.split(config)
    return crops.held_out_crops(held_out, size, config.held_out_crops)[numbers]


def draw(columns: list[tuple[str, torch.Tensor]]) -> Image.Image:
    """A sheet with a titled column for each batch of images [N, 3, H, W]."""
    rows = len(columns[0][1])
    sheet = Image.new(
        "RGB", (len(columns) * (TILE + GAP) - GAP, HEADER + rows * (TILE + GAP) - GAP), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for x, (title, images) in enumerate(columns):
        left = x * (TILE + GAP)
        pen.text((left + TILE / 2, HEADER / 2), title, fill="black", anchor="mm", font=font)
        for y, pixels in enumerate(to_pixels(images)):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, HEADER + y * (TILE + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--checkpoint", default="runs/tokenizer", help="a run or a checkpoint")
    parser.add_argument("--scales", nargs="+", type=int, help="how many scales each column shows")
    parser.add_argument("--crops", nargs="+", type=int, default=[15, 22, 37, 87])
    parser.add_argument("--out", type=Path, default=Path("reconstruction.png"))
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already: name another --out")

    tokenizer, _ = load_tokenizer(arguments.checkpoint)
    images = images_to_show(arguments.photos, arguments.crops, tokenizer.config.image_size)
    counts = tokenizer.quantizer.tokens_per_scale
    columns = [("original", images)]
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        print(f"{tuple(images.shape)} -> {tuple(tokens.shape)} tokens")
        for upto in arguments.scales or range(1, len(counts) + 1):
            decoded, _ = tokenizer.decode(tokens, upto=upto)
            used = sum(counts[:upto])
            columns.append((f"{used} token{'s' if used > 1 else ''}", decoded))
            error = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4
            psnr = (-10 * error.log10()).mean().item()
            print(f"first {used:4d} tokens: PSNR {psnr:.2f} dB")
    draw(columns).save(arguments.out, optimize=True)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
