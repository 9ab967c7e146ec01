"""What the tabs share of Gradio: how functions are called, told errors, picked pictures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import numpy as np
from PIL import Image
from tqdm import tqdm

from tokenflow_ext.train.data import (
    BrokenImageError,
    DataError,
    list_images,
    open_image,
    photographs,
)
from tokenflow_ext.train.data.image_files import cut_long, to_square
from tokenflow_ext.train.data.text_files import Tally
from tokenflow_ext.train.engine.messages import EXPECTED, one_line, out_of_memory
from tokenflow_ext.train.evaluation.preprocess import evenly_spread

from . import html

#: Of every event: no name in an interface for programs, and one call of a model at a time, so that
#: people who look at the page at once wait for each other.
EVENT: dict[str, Any] = {
    "api_visibility": "private",
    "concurrency_limit": 1,
    "concurrency_id": "models",
    "show_progress": "minimal",
}
#: Seconds for which a session's state is kept.
KEPT = 3600
Held = TypeVar("Held")
#: Pictures to begin with, at most, and their sides in pixels where they are picked.
_EXAMPLES, _SIDE = 12, 96


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its expected errors shown to people as one line; what the page shows stays
    as it is. (An error of Gradio's would hide it.)"""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*arguments: Any) -> Iterator[Any]:
            try:
                yield from function(*arguments)
            except Exception as error:
                yield _tell(error)

        return steps

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            return _tell(error)

    return call


def _tell(error: Exception) -> dict[str, Any]:
    """Show an error's line; gives what changes nothing on the page.

    Raises:
        Exception: the error itself, where it is a fault of the program.
    """
    line = one_line(error) if isinstance(error, EXPECTED) else out_of_memory(error)
    if line is None:
        raise error
    gr.Warning(escape(line))
    return gr.skip()


def number(event: gr.EventData, count: int) -> int:
    """The ``number`` of what was clicked, of so many.

    Raises:
        DataError: none of them; a page of ours does not send it.
    """
    found = event.number
    if not isinstance(found, int) or not 0 <= found < count:
        raise DataError(f"there is no number {found!r} here, of {count}")
    return found


def held(state: Held | None) -> Held:
    """What the session has in memory.

    Raises:
        DataError: nothing, because the server was started anew or an hour has passed.
    """
    if state is None:
        raise DataError("this page's picture is no longer in memory: pick one again")
    return state


def readable(folder: str, limit: int | None) -> list[Path]:
    """Of the images below a folder so many, evenly spread; what of them cannot be read is left out,
    and a line says so.

    Raises:
        DataError: no image that can be read.
    """
    found, left = [], Tally(folder)
    for path in tqdm(evenly_spread(list_images(folder), limit), desc="pictures", leave=False):
        try:
            open_image(path)
        except BrokenImageError as error:
            left.add("images that cannot be read", str(error))
        else:
            found.append(path)
    if not found:
        raise DataError(f"no image below {folder} can be read: {left}")
    left.say(f"{len(found)} images; left out")
    return found


class Examples:
    """Pictures to begin with: some of those at the paths, or of the photographs that come with
    packages the middle of half the shorter side, which is as large as what the demonstration is
    trained on."""

    def __init__(self, paths: list[Path] | None) -> None:
        self.cut = paths is None
        self.paths = evenly_spread(photographs() if paths is None else paths, _EXAMPLES)
        small = [np.asarray(to_square(self.open(at), _SIDE)) for at in range(len(self.paths))]
        names = [path.name for path in self.paths]
        self.html = html.examples(list(zip(names, small, strict=True)))

    def open(self, number: int) -> Image.Image:
        """A picture as RGB."""
        image = open_image(self.paths[number])
        if self.cut:
            side = min(image.size) // 2
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        return image

    def show(self) -> gr.HTML:
        """The pictures; a click on one has its ``number``."""
        return gr.HTML(self.html, js_on_load=html.CLICKS)


def upload() -> gr.File:
    """Where a picture of one's own is dropped: its bytes, whatever its name."""
    return gr.File(label="or drop a picture of your own", type="binary", height=170)


def on_upload(file: gr.File, function: Callable[[bytes], Any], outputs: list[Any]) -> None:
    """What becomes of a picture that is dropped. Then the next one can be, whether this one could
    be read or not."""
    event = file.upload(told(function), file, outputs, **EVENT)
    event.then(lambda: None, None, file, api_visibility="private", queue=False)


def read_upload(content: bytes) -> Image.Image:
    """What was dropped, as RGB; the bytes decide what it is, not its name. Of a picture over 16
    times as long as wide the middle 16 : 1.

    Raises:
        BrokenImageError: no image that can be read.
    """
    return cut_long(open_image(Path("that you chose"), content))
