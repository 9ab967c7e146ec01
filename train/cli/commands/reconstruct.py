"""``tokenflow reconstruct``: pictures to tokens and back."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.train.cli import options
from tokenflow_ext.train.data import DataError, open_image, outputs, text_files, tokens
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import find_device
from tokenflow_ext.train.engine.logs import over_under

HELP = "pictures to tokens and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    options.add_tokenizer(parser)
    options.add_out(parser, "reconstructions")
    options.add_overwrite(parser)
    options.add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    reconstruct(
        arguments.images,
        arguments.checkpoint,
        arguments.out,
        arguments.device,
        arguments.resolution,
        arguments.overwrite,
    )


@torch.no_grad()
def reconstruct(
    images: list[str],
    source: str,
    out: str,
    device: str = "cpu",
    resolution: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write for each image NAME.png (original over reconstruction) and NAME.safetensors (tokens).

    Images of one name are told apart by a number (NAME~2).

    Returns:
        The pictures' paths.

    Raises:
        OutputError: a file of such a name is there, and ``overwrite`` is false or it is an input.
    """
    place_of_work = find_device(device)
    checkpoint.check_there(source)
    for name in images:  # each is read once before the first is written
        text_files.require_file(name)
        open_image(Path(name))
    stems = outputs.distinct_names([Path(name).stem for name in images], ".safetensors")
    target = outputs.Outputs(Path(out), overwrite)
    target.claim([stem + suffix for stem in stems for suffix in (".png", ".safetensors")], images)
    model, folder = checkpoint.load_tokenizer(source, resolution)
    model.to(place_of_work)
    if not model.config.pixel.enabled:
        raise ConfigError(
            f"{folder} decodes no images (its pixel.enabled is false): `tokenflow tokenize` gives "
            "its tokens"
        )
    facts, written = tokens.facts(model, folder), []
    for name, stem in zip(images, stems, strict=True):
        original = read_square(Path(name), model.config.image_size)[None].to(place_of_work)
        codes = model.encode(original)
        made = model.decode(codes)[0]
        assert made is not None  # there is a pixel branch
        if not made.isfinite().all():  # 8 bits would hide it
            raise DataError(f"the reconstruction of {name} is not finite")
        sheet = outputs.png(over_under(original, made, least=256))
        stored = tokens.encoded(codes.cpu(), facts | {"image": name})
        with target.together():
            target.write(f"{stem}.safetensors", stored)
            picture = target.write(f"{stem}.png", sheet)
        likeness = psnr(to_uint8(made), to_uint8(original)).item()  # as `tokenflow evaluate`
        said = f"{codes.shape[1]} tokens, {likeness:.2f} dB"
        print(f"{text_files.printable(name)}: {said}, {text_files.printable(picture)}")
        written.append(picture)
    return written
