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
from tokenflow_ext.train.engine.precision import arithmetic

HELP = "pictures to tokens and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    options.add_tokenizer(parser)
    options.add_out(parser, "reconstructions")
    options.add_overwrite(parser)
    options.add_batch_size(parser, 16)
    options.add_device(parser)
    options.add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    options.check_counts(arguments, batch_size=1)
    reconstruct(
        arguments.images,
        options.checkpoint(arguments),
        arguments.out,
        arguments.device,
        arguments.resolution,
        arguments.overwrite,
        dtype=arguments.dtype,
        batch=arguments.batch_size,
    )


@torch.no_grad()
def reconstruct(
    images: list[str],
    source: str | Path,
    out: str,
    device: str = "auto",
    resolution: int | None = None,
    overwrite: bool = False,
    *,
    dtype: str = "float32",
    batch: int = 16,
) -> list[Path]:
    """Write for each image NAME.png (original over reconstruction) and NAME.safetensors (tokens).

    Images of one name are told apart by a number (NAME~2).

    Args:
        dtype: of the encoders' and decoders' arithmetic.
        batch: images at once.

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
    for start in range(0, len(images), batch):
        several, at = images[start : start + batch], slice(start, start + batch)
        squares = [read_square(Path(name), model.config.image_size) for name in several]
        originals = torch.stack(squares).to(place_of_work)
        with arithmetic(place_of_work, dtype):
            codes = model.encode(originals)
            made = model.decode(codes)[0]
        assert made is not None  # there is a pixel branch
        made = made.float()
        for row, (name, stem) in enumerate(zip(several, stems[at], strict=True)):
            if not made[row].isfinite().all():  # 8 bits would hide it
                raise DataError(f"the reconstruction of {name} is not finite")
            one = slice(row, row + 1)
            sheet = outputs.png(over_under(originals[one], made[one], least=256))
            stored = tokens.encoded(codes[one].cpu(), facts | {"image": name})
            with target.together():
                target.write(f"{stem}.safetensors", stored)
                picture = target.write(f"{stem}.png", sheet)
            # As `tokenflow evaluate`.
            likeness = psnr(to_uint8(made[one]), to_uint8(originals[one])).item()
            said = f"{codes.shape[1]} tokens, {likeness:.2f} dB"
            print(f"{text_files.printable(name)}: {said}, {text_files.printable(picture)}")
            written.append(picture)
    return written
