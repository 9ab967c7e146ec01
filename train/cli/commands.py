"""The command ``tokenflow``: train a tokenizer or text to image, and use what was trained."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from tokenflow_ext.models import ConfigError, TokenFlowTokenizer
from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.sampler import PRESETS
from tokenflow_ext.train import data, decoder, text_to_image, tokenizer
from tokenflow_ext.train.config import CaptionConfig
from tokenflow_ext.train.data import emojis, outputs, text_files, tokens
from tokenflow_ext.train.data.captions import list_captions
from tokenflow_ext.train.data.image_files import open_image, read_square
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import find_device
from tokenflow_ext.train.engine.logs import over_under
from tokenflow_ext.train.engine.messages import ending_in_one_line
from tokenflow_ext.train.evaluation import analyse, evaluate, fid

from . import generate


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
        if not made.isfinite().all():  # 8 bits would hide it
            raise data.DataError(f"the reconstruction of {name} is not finite")
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


@torch.no_grad()
def tokenize(
    folder: str,
    source: str,
    out: str,
    *,
    device: str = "cpu",
    resolution: int | None = None,
    batch: int = 32,
    shard: int = 4096,
    caption_keys: Sequence[str] = CaptionConfig.caption_keys,
) -> Path:
    """Write the tokens of every image below ``folder`` as shards; returns the index's path.

    Files that cannot be read are left out, and named in the index.

    The index (index.json) is written last: a folder without it is not finished, and is gone on
    with by the same call. See docs/guides/training.md for the format.

    Raises:
        OutputError: ``out`` holds other things, or tokens of something else.
    """
    place_of_work, target = find_device(device), Path(out)
    tokens.check_target(target)
    model, place = checkpoint.load_tokenizer(source, resolution)
    about = tokens.facts(model, place) | {"tokenizer_sha256": tokens.fingerprint(model)}
    captions = list_captions(folder, caption_keys)
    paths = sorted(captions)
    about |= {"data_sha256": tokens.data_digest(Path(folder), captions), "shard_size": shard}
    model.to(place_of_work)
    with tokens.writing(target, about) as finished:
        index = target / tokens.INDEX
        if finished:
            print(f"the same tokens are there already: {index}")
            return index
        names = {path: str(path.relative_to(folder)) for path in paths}
        shards, skipped, found = [], [], 0
        with tqdm(total=len(paths), unit="image") as bar:
            for number, start in enumerate(range(0, len(paths), shard)):
                part, chosen = tokens.Shard(target, number), paths[start : start + shard]
                rows = part.written()
                if rows is not None:
                    found += 1
                    bar.update(len(chosen))
                else:
                    codes, kept = _encode(model, chosen, batch, place_of_work, bar)
                    rows = [{"image": names[path], "caption": captions[path]} for path in kept]
                    if rows:
                        part.write(torch.cat(codes), rows, about)
                read = {row["image"] for row in rows}
                skipped += [names[path] for path in chosen if names[path] not in read]
                if rows:
                    shards.append({**part.names, "count": len(rows)})
        images = sum(entry["count"] for entry in shards)
        if not images:
            raise data.DataError(f"no image below {folder} can be read")
        tokens.finish(target, about | {"images": images, "skipped": skipped, "shards": shards})
    if found:
        print(f"{found} shards were there already, of a run that was broken off")
    if skipped:
        print(f"{len(skipped)} images cannot be read and were left out; {index} names them")
    print(f"{images} images, {about['tokens_per_image']} tokens each, {index}")
    return index


def _encode(
    model: TokenFlowTokenizer, paths: list[Path], batch: int, device: torch.device, bar: tqdm
) -> tuple[list[torch.Tensor], list[Path]]:
    """Tokens of images by batches, and the images that could be read; the bar names the others."""
    codes, kept = [], []
    for at in range(0, len(paths), batch):
        squares = []
        for path in paths[at : at + batch]:
            bar.update()
            try:
                squares.append(read_square(path, model.config.image_size))
            except data.DataError as error:  # one of a million must not end the others
                bar.write(f"left out: {error}")
                continue
            kept.append(path)
        if squares:
            codes.append(model.encode(torch.stack(squares).to(device)).cpu())
    return codes, kept


def _add_generate(draw: argparse.ArgumentParser) -> None:
    source = draw.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="*", default=[], metavar="PROMPT")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="one a line; GenEval's evaluation_metadata.jsonl; DPG-Bench's folder of prompts",
    )
    draw.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run of train/text_to_image.py, one of its checkpoints, or a saved model",
    )
    draw.add_argument("--out", default="outputs", metavar="DIR", help="[%(default)s]")
    outputs.add_overwrite(draw)
    draw.add_argument(
        "--layout",
        choices=generate.LAYOUTS,
        default="plain",
        help="the folders that GenEval or DPG-Bench reads [%(default)s]",
    )
    draw.add_argument("--each", type=int, help="pictures a prompt [1; 4 for a benchmark]")
    draw.add_argument("--seed", type=int, default=0, help="of the first picture [%(default)s]")
    draw.add_argument("--grid", action="store_true", help="all of them in grid.png, too")
    draw.add_argument("--steps", choices=tuple(PRESETS), default="three", help="[three]")
    draw.add_argument("--guidance", type=float, default=7.5, help="[%(default)s]")
    draw.add_argument(
        "--negative", default="", metavar="TEXT", help="what guidance leads away from [nothing]"
    )
    draw.add_argument("--batch-size", type=int, default=16, help="images at once [%(default)s]")
    draw.add_argument("--device", default="cpu", help="[%(default)s]")


def _generate(known: argparse.Namespace) -> None:
    each = known.each
    if each is None:
        each = 1 if known.layout == "plain" else 4
    data.check_counts(known, each=1, batch_size=1, guidance=0)
    if not -(2**63) <= known.seed < 2**64:
        raise data.DataError(f"--seed must be a whole number of 64 bits, got {known.seed}")
    generate.check_text(known.negative, "--negative")
    find_device(known.device)
    checkpoint.check_there(known.checkpoint)
    if known.prompts is not None:
        prompts = generate.read_prompts(known.prompts, known.layout)
    elif known.layout == "plain":
        prompts = generate.plain_prompts(known.prompt)
    else:
        raise data.DataError(f"--layout {known.layout} needs the benchmark's file: --prompts FILE")
    # Before the model is read: everything but whether what is there is another model's.
    drawn = generate.facts(known.steps, known.guidance, known.negative)
    wanted = generate.pictures(prompts, known.layout, each, known.seed, drawn)
    target = outputs.Outputs(Path(known.out), known.overwrite)
    generate.claim(target, prompts, wanted, known.layout, grid=False)
    painter = generate.Painter.load(
        known.checkpoint,
        known.device,
        steps=known.steps,
        guidance=known.guidance,
        negative=known.negative,
        batch=known.batch_size,
    )
    written = generate.write(
        painter,
        prompts,
        known.out,
        layout=known.layout,
        each=each,
        seed=known.seed,
        grid=known.grid,
        overwrite=known.overwrite,
    )
    print(f"{len(written)} pictures in {known.out}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="tokenflow", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "train", add_help=False, help="train a tokenizer; the same as torchrun train/tokenizer.py"
    )
    commands.add_parser(
        "train-decoder",
        add_help=False,
        help="fine-tune a pixel decoder; the same as torchrun train/decoder.py",
    )
    commands.add_parser(
        "train-text",
        add_help=False,
        help="train text to image; the same as torchrun train/text_to_image.py",
    )
    use = commands.add_parser("reconstruct", help="pictures to tokens and back")
    use.add_argument("images", nargs="+", metavar="IMAGE")
    write = commands.add_parser("tokenize", help="a folder of images to shards of tokens")
    write.add_argument("folder", metavar="FOLDER")
    write.add_argument("--batch", type=int, default=32, help="images encoded at once")
    write.add_argument("--shard", type=int, default=4096, help="images in a file")
    write.add_argument(
        "--caption-keys",
        nargs="+",
        default=CaptionConfig.caption_keys,
        metavar="KEY",
        help="of captions in metadata.jsonl and NAME.json [caption text]",
    )
    for sub, default in ((use, "reconstructions"), (write, "tokens")):
        checkpoint.add_tokenizer_arguments(sub)
        sub.add_argument("--out", default=default, metavar="DIR", help="[%(default)s]")
        sub.add_argument("--device", default="cpu", help="[%(default)s]")
    outputs.add_overwrite(use)
    fetch = commands.add_parser("fetch-emoji", help="fetch the named emojis of the demonstration")
    fetch.add_argument("folder", metavar="DIR")
    fetch.add_argument("--skin-tones", action="store_true", help="with variants by skin tone")
    fetch.add_argument("--tarball", metavar="FILE", help="the package's file, where npm is not")
    _add_generate(commands.add_parser("generate", help="pictures from prompts"))
    evaluate.add_arguments(
        commands.add_parser("evaluate", help="a tokenizer's figures of reconstruction on a folder")
    )
    analyse.add_arguments(
        commands.add_parser("analyse", help="which images share a code, and how many codes do")
    )
    distance = commands.add_parser("fid", help="FID of two folders of pictures")
    distance.add_argument("folders", nargs=2, metavar="DIR")
    distance.add_argument("--weights", metavar="FILE", help=f"{fid.WEIGHTS}")
    distance.add_argument("--batch-size", type=int, default=64, help="[%(default)s]")
    distance.add_argument("--device", default="cpu", help="[%(default)s]")
    trainers = {
        "train": tokenizer.main,
        "train-decoder": decoder.main,
        "train-text": text_to_image.main,
    }
    if arguments and arguments[0] in trainers:
        return trainers[arguments[0]](arguments[1:])
    known = parser.parse_args(arguments)
    with ending_in_one_line():
        _run(known)


def _run(known: argparse.Namespace) -> None:
    if getattr(known, "out", None) == "":
        raise outputs.OutputError("--out names no folder")
    if known.command == "reconstruct":
        reconstruct(
            known.images,
            known.checkpoint,
            known.out,
            known.device,
            known.resolution,
            known.overwrite,
        )
    elif known.command == "generate":
        _generate(known)
    elif known.command == "evaluate":
        evaluate.command(known)
    elif known.command == "analyse":
        analyse.command(known)
    elif known.command == "fid":
        data.check_counts(known, batch_size=1)
        value = fid.fid(*known.folders, known.weights, known.device, known.batch_size)
        print(f"FID {value:.4f}")
    elif known.command == "fetch-emoji":
        if known.tarball:
            tarball, folder = Path(known.tarball), Path(known.folder)
            emojis.from_tarball(tarball, folder, known.skin_tones)
        else:
            emojis.fetch(known.folder, known.skin_tones)
    else:
        data.check_counts(known, batch=1, shard=1)
        tokenize(
            known.folder,
            known.checkpoint,
            known.out,
            device=known.device,
            resolution=known.resolution,
            batch=known.batch,
            shard=known.shard,
            caption_keys=known.caption_keys,
        )
