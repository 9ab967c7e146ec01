"""``tokenflow demo``: a page in the browser that shows what trained models do."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import threading

from tokenflow_ext.errors import MissingPackageError
from tokenflow_ext.train.cli import options
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.demo.temporary import folder_of_gradio
from tokenflow_ext.train.engine.distributed import find_device

HELP = "a page in the browser: tokens, reconstructions, drawings, answers, codebook"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    options.add_tokenizer(
        parser, several=True, more=", of any kind; several: all of them are shown"
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="pictures of which patches are shown [squares of the built-in photographs]",
    )
    parser.add_argument(
        "--known", type=int, default=500, metavar="N", help="so many, evenly spread [%(default)s]"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to serve at [%(default)s, this machine]"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free [%(default)s]")
    options.add_device(parser)
    options.add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command: serves until it is stopped."""
    options.check_counts(arguments, known=1, port=0)
    if arguments.port > 65535:
        raise DataError(f"--port must be 65535 or less, got {arguments.port}")
    device = find_device(arguments.device)
    if importlib.util.find_spec("gradio") is None:
        raise MissingPackageError("tokenflow demo needs gradio: pip install 'tokenflow_ext[demo]'")
    from tokenflow_ext.train.demo import models  # needs transformers

    sources = options.checkpoint(arguments)
    found = models.load(sources, device, arguments.resolution, arguments.dtype)
    with folder_of_gradio():
        from tokenflow_ext.train.demo import page  # needs gradio

        made = page.build(found, arguments.data, arguments.known)
        with page.serving(made, arguments.host, arguments.port) as address:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            if not _is_loopback(arguments.host):
                print(f"--host {arguments.host}: others on the network can use it", flush=True)
            threading.Event().wait()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
