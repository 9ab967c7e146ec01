"""``tokenflow tokenize``: a folder of images to shards of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.cli import options
from tokenflow_ext.train.config import CaptionConfig, LabelConfig
from tokenflow_ext.train.data import DataError, tokens
from tokenflow_ext.train.data.captions import list_captions
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.data.labels import described
from tokenflow_ext.train.data.text_files import METADATA
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import find_device

HELP = "a folder of images to shards of tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folder", metavar="FOLDER")
    options.add_tokenizer(parser)
    options.add_out(parser, "tokens")
    options.add_batch_size(parser, 32)
    parser.add_argument(
        "--shard-size", type=int, default=4096, metavar="N", help="images in a file [%(default)s]"
    )
    options.add_renamed(parser, "--batch", "--batch-size")
    options.add_renamed(parser, "--shard", "--shard-size")
    parser.add_argument(
        "--caption-keys",
        nargs="+",
        default=CaptionConfig.caption_keys,
        metavar="KEY",
        help="of captions in metadata.jsonl and NAME.json [caption text]",
    )
    parser.add_argument(
        "--label-keys",
        nargs="+",
        default=LabelConfig.label_keys,
        metavar="KEY",
        help="of classes in metadata.jsonl [label class]",
    )
    options.add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    options.check_counts(arguments, batch_size=1, shard_size=1)
    tokenize(
        arguments.folder,
        arguments.checkpoint,
        arguments.out,
        device=arguments.device,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        caption_keys=arguments.caption_keys,
        label_keys=arguments.label_keys,
    )


@torch.no_grad()
def tokenize(
    folder: str,
    source: str,
    out: str,
    *,
    device: str = "cpu",
    resolution: int | None = None,
    batch_size: int = 32,
    shard_size: int = 4096,
    caption_keys: Sequence[str] = CaptionConfig.caption_keys,
    label_keys: Sequence[str] = LabelConfig.label_keys,
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
    found = described(Path(folder), label_keys)
    labels = {path: label for path, (label, _) in found.items() if label}
    if bad := [why for label, why in found.values() if not label]:
        print(f"{len(bad)} labels in {METADATA} are left out, of pictures {bad[0]}")
    paths = sorted(captions)
    digest = tokens.data_digest(Path(folder), captions, labels)
    about |= {"data_sha256": digest, "shard_size": shard_size}
    model.to(place_of_work)
    with tokens.writing(target, about) as finished:
        index = target / tokens.INDEX
        if finished:
            print(f"the same tokens are there already: {index}")
            return index
        names = {path: str(path.relative_to(folder)) for path in paths}
        shards: list[dict[str, Any]] = []
        skipped: list[str] = []
        earlier = 0
        with tqdm(total=len(paths), unit="image") as bar:
            for number, start in enumerate(range(0, len(paths), shard_size)):
                part, chosen = tokens.Shard(target, number), paths[start : start + shard_size]
                rows = part.written()
                if rows is not None:
                    earlier += 1
                    bar.update(len(chosen))
                else:
                    codes, kept = _encode(model, chosen, batch_size, place_of_work, bar)
                    rows = [
                        {"image": names[path], "caption": captions[path]}
                        | ({"label": labels[path]} if path in labels else {})
                        for path in kept
                    ]
                    if rows:
                        part.write(torch.cat(codes), rows, about)
                read = {row["image"] for row in rows}
                skipped += [names[path] for path in chosen if names[path] not in read]
                if rows:
                    shards.append({**part.names, "count": len(rows)})
        images = sum(entry["count"] for entry in shards)
        if not images:
            raise DataError(f"no image below {folder} can be read")
        tokens.finish(target, about | {"images": images, "skipped": skipped, "shards": shards})
    if earlier:
        print(f"{earlier} shards were there already, of a run that was broken off")
    if skipped:
        print(f"{len(skipped)} images cannot be read and were left out; {index} names them")
    print(f"{images} images, {about['tokens_per_image']} tokens each, {index}")
    return index


def _encode(
    model: TokenFlowTokenizer, paths: list[Path], batch_size: int, device: torch.device, bar: tqdm
) -> tuple[list[torch.Tensor], list[Path]]:
    """Tokens of images by batches, and the images that could be read; the bar names the others."""
    codes, kept = [], []
    for at in range(0, len(paths), batch_size):
        squares = []
        for path in paths[at : at + batch_size]:
            bar.update()
            try:
                squares.append(read_square(path, model.config.image_size))
            except DataError as error:  # one of a million must not end the others
                bar.write(f"left out: {error}")
                continue
            kept.append(path)
        if squares:
            codes.append(model.encode(torch.stack(squares).to(device)).cpu())
    return codes, kept
