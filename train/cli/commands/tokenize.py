"""``tokenflow tokenize``: folders of images and WebDataset shards to shards of tokens."""

from __future__ import annotations

import argparse

from tokenflow_ext.train.cli import options
from tokenflow_ext.train.config import CaptionConfig, LabelConfig
from tokenflow_ext.train.corpus.tokenize import tokenize as tokenize
from tokenflow_ext.train.data.tokens import LAYOUTS

HELP = "folders of images and WebDataset shards to shards of tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a folder of images or of shards (.tar), a shard, or a pattern such as "
        "shards/{000..127}.tar; local or a URL (s3://, gs://, https://, hf://)",
    )
    options.add_tokenizer(parser)
    options.add_out(parser, "tokens")
    options.add_batch_size(parser, 32)
    parser.add_argument(
        "--shard-size",
        type=int,
        default=4096,
        metavar="N",
        help="images of a folder in a file [%(default)s]. Of a source's shard one is made",
    )
    options.add_renamed(parser, "--batch", "--batch-size")
    options.add_renamed(parser, "--shard", "--shard-size")
    parser.add_argument(
        "--shard-layout",
        choices=LAYOUTS,
        default="safetensors",
        help="of the shards: one tensor a file, or tar files of KEY.tokens.npy beside KEY.txt, "
        "KEY.json and KEY.cls [%(default)s]",
    )
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
        help="of classes in metadata.jsonl and NAME.json [label class]",
    )
    options.add_workers(parser)
    parser.add_argument(
        "--strict", action="store_true", help="end at the first image that cannot be read"
    )
    parser.add_argument(
        "--engine",
        choices=("torch", "ray"),
        default="torch",
        help="this process or torchrun's, or the actors of a Ray cluster [%(default)s]",
    )
    parser.add_argument(
        "--ray-workers", type=int, metavar="N", help="actors [one a GPU, or one a core]"
    )
    options.add_device(parser)
    options.add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    options.check_counts(arguments, batch_size=1, shard_size=1, workers=0, ray_workers=1)
    tokenize(
        arguments.sources,
        options.checkpoint(arguments),
        arguments.out,
        engine=arguments.engine,
        device=arguments.device,
        resolution=arguments.resolution,
        dtype=arguments.dtype,
        layout=arguments.shard_layout,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        shard_size=arguments.shard_size,
        strict=arguments.strict,
        caption_keys=arguments.caption_keys,
        label_keys=arguments.label_keys,
        ray_workers=arguments.ray_workers,
    )
