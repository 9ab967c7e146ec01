"""Options that several commands have, each under one name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from tokenflow_ext._deprecated import warn_renamed
from tokenflow_ext.models.serialization.files import OutputError
from tokenflow_ext.models.serialization.hub import Hub
from tokenflow_ext.models.understanding.names import DTYPES
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.engine.checkpoint import check_there

_MOST = 2**31 - 1


def add_checkpoint(parser: argparse.ArgumentParser, what: str, several: bool = False) -> None:
    """``--checkpoint``, and ``--filename`` and ``--revision`` of one on the hub; :func:`checkpoint`
    reads them.

    Args:
        what: what it may be, besides a hub id.
        several: ``--checkpoint`` may be repeated, and is a list.
    """
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append" if several else "store",
        metavar="PATH",
        help=f"{what}; or a hub id, ORG/NAME",
    )
    parser.add_argument("--filename", metavar="FILE", help="of a hub id [its only file of weights]")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id [main]")


def checkpoint(arguments: argparse.Namespace) -> Any:
    """What :func:`add_checkpoint` read, as a path on this machine, or a list of them. What is on
    the hub is fetched.

    Raises:
        CheckpointError: nothing there.
        ConfigError: an option of the hub beside a path.
    """
    hub = Hub(filename=arguments.filename, revision=arguments.revision)
    given = arguments.checkpoint
    if isinstance(given, list):
        return [str(check_there(source, hub)) for source in given]
    return str(check_there(given, hub))


def add_tokenizer(parser: argparse.ArgumentParser, several: bool = False, more: str = "") -> None:
    """:func:`add_checkpoint` and ``--resolution`` of a command that uses tokenizers.

    Args:
        several: ``--checkpoint`` may be repeated, and is a list.
        more: what its help says at the end.
    """
    what = "a run, a checkpoint, a folder of save_pretrained, or an original checkpoint"
    add_checkpoint(parser, what + more, several)
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="of an original checkpoint of B: 224 or 256 [224]",
    )


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """``--out``."""
    parser.add_argument("--out", type=_folder, default=default, metavar="DIR", help="[%(default)s]")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """``--overwrite`` of a command that replaces files."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that are there, but no input"
    )


def _folder(name: str) -> str:
    if not name:
        raise OutputError("--out names no folder")
    return name


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N, or auto: CUDA where it is [auto]"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the model's arithmetic; the search for codes is in float32 [%(default)s]",
    )


def add_batch_size(parser: argparse.ArgumentParser, default: int) -> None:
    """``--batch-size``."""
    parser.add_argument(
        "--batch-size",
        type=int,
        default=default,
        metavar="N",
        help="images at once in a process [%(default)s]",
    )


def add_max_tokens(parser: argparse.ArgumentParser) -> None:
    """``--max-tokens``."""
    parser.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="of an answer [%(default)s]"
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """``--limit``, ``--batch-size``, ``--workers``, ``--device``, ``--dtype`` of a command over
    many images."""
    parser.add_argument("--limit", type=int, metavar="N", help="so many, evenly spread [all]")
    add_batch_size(parser, 32)
    add_workers(parser)
    add_device(parser)
    add_dtype(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers``."""
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that decode images, each [%(default)s]",
    )


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_reading` read, but for the device, as keyword arguments.

    Raises:
        DataError: a number that is too small.
    """
    check_counts(arguments, limit=1, batch_size=1, workers=0)
    return {
        "limit": arguments.limit,
        "batch": arguments.batch_size,
        "workers": arguments.workers,
        "dtype": arguments.dtype,
    }


def check_counts(arguments: argparse.Namespace, **least: int) -> None:
    """That numbers, where they are given, are large enough.

    Args:
        arguments: has them as attributes.
        least: the smallest value of each.

    Raises:
        DataError: naming the option.
    """
    for name, minimum in least.items():
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is not None and not minimum <= value < math.inf:  # a NaN is not, either
            raise DataError(f"{option} must be {minimum} or more, got {value}")
        if value is not None and value > _MOST:
            raise DataError(f"{option} must be {_MOST} or less, got {value}")


class _Renamed(argparse.Action):
    """An option under its name of before."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        warn_renamed(option_string or "", new)
        setattr(namespace, self.dest, values)


def add_renamed(parser: argparse.ArgumentParser, old: str, new: str, kind: type = int) -> None:
    """Lets ``new`` be called ``old`` too, with a DeprecationWarning and without a line of help."""
    parser.add_argument(
        old,
        dest=new.removeprefix("--").replace("-", "_"),
        type=kind,
        action=_Renamed,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
