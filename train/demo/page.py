"""The page: its tabs, and the server that shows it."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TypeVar

import gradio as gr

from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.evaluation.preprocess import CenterCropDataset, PhotographCrops

from . import ask, codebook, draw, html, reconstruct
from .models import Models
from .parts import KEPT, Examples, readable
from .patches import indices_of
from .pictures import decodes

Item = TypeVar("Item")

#: Bytes of an uploaded picture, at most.
MOST_BYTES = 20 * 2**20
#: Seconds between looks for uploaded files that are older than `KEPT`, which are removed.
_LOOKED = 600
#: Sessions whose state is kept, and calls that wait.
_SESSIONS = 100
_WAITING = 20
# Names of fonts alone: Gradio fetches none of them.
_FONTS = ("system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Consolas", "monospace")
_HEAD = """
<div class="tf"><h2 style="margin:.2rem 0 0">tokenflow</h2>
<p class="tf-note" style="margin:0">Pictures as tokens, and back. Showing {names}.</p></div>
"""
_BLIND = (
    '<p class="tf-note"><b>{name}</b> decodes no pictures (its pixel.enabled is false): it has the '
    "tab <i>codebook</i> alone.</p>"
)


def build(models: Models, folder: str | None, limit: int | None) -> gr.Blocks:
    """The page of these models.

    Args:
        folder: the pictures of which patches are shown; None takes squares of the photographs that
            come with packages.
        limit: so many of the pictures, evenly spread.

    Raises:
        DataError: no picture that can be read.
    """
    paths = None if folder is None else readable(folder, limit)
    examples = Examples(paths)

    @functools.cache
    def squares(size: int) -> CenterCropDataset:
        return PhotographCrops(size, limit) if paths is None else CenterCropDataset(paths, size)

    indices = {}
    for name, tokenizer in models.tokenizers.items():
        images = squares(tokenizer.config.image_size)
        indices[name] = indices_of(tokenizer, images, name)
    drawn = {name: one for name, one in models.tokenizers.items() if decodes(one)}
    names = dict.fromkeys((*models.tokenizers, *models.drawing, *models.answering))
    with gr.Blocks(
        title="tokenflow", analytics_enabled=False, delete_cache=(_LOOKED, KEPT)
    ) as page:
        gr.HTML(_HEAD.format(names=", ".join(f"<b>{escape(name)}</b>" for name in names)))
        for name in (name for name in models.tokenizers if name not in drawn):
            gr.HTML(html.framed(_BLIND.format(name=escape(name))))
        with gr.Tabs():
            _tab(
                "Reconstruct",
                drawn,
                lambda name, one: reconstruct.build(page, one, indices[name], examples),
            )
            _tab("Draw", models.drawing, lambda _, one: draw.build(one))
            _tab("Ask", models.answering, lambda _, one: ask.build(one, examples))
            _tab("Codebook", indices, lambda _, one: codebook.build(one))
    return page


def _tab(title: str, items: dict[str, Item], lay_out: Callable[[str, Item], None]) -> None:
    """A tab, where there is anything to show in it; of several, a tab for each inside."""
    if not items:
        return
    with gr.Tab(title):
        if len(items) == 1:
            [(name, item)] = items.items()
            lay_out(name, item)
            return
        with gr.Tabs():
            for name, item in items.items():
                with gr.Tab(name):
                    lay_out(name, item)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.bind((host, 0))
        return int(tried.getsockname()[1])


@contextmanager
def serving(page: gr.Blocks, host: str, port: int) -> Iterator[str]:
    """Serve the page, inside :func:`.temporary.folder_of_gradio`; gives its address.

    Args:
        port: 0 takes one that is free.

    Raises:
        DataError: the address cannot be served at.
    """
    page.queue(default_concurrency_limit=1, max_size=_WAITING)
    try:
        port = port or _free_port(host)
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MOST_BYTES,
            state_session_capacity=_SESSIONS,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Soft(font=_FONTS, font_mono=_MONO),
            css=html.STYLE,
        )
    except OSError as error:
        raise DataError(
            f"cannot serve at {host}, port {port}: another program may have the port (--port 0 "
            "takes any that is free), or --host is no address of this machine"
        ) from error
    try:
        yield address
    finally:
        page.close(verbose=False)
