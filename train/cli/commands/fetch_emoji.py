"""``tokenflow fetch-emoji``: the named emojis of the demonstration."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflow_ext.train.data import emojis

HELP = "fetch the named emojis of the demonstration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--skin-tones", action="store_true", help="with variants by skin tone")
    parser.add_argument("--tarball", metavar="FILE", help="the package's file, where npm is not")


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    if arguments.tarball:
        emojis.from_tarball(Path(arguments.tarball), Path(arguments.folder), arguments.skin_tones)
    else:
        emojis.fetch(arguments.folder, arguments.skin_tones)
