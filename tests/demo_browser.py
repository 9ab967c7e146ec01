"""``tokenflow demo`` in a real browser: starting both, and the README's picture of the page.

python tests/demo_browser.py RUN docs/images/demo.png
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
#: What the browser itself would ask the network for is off.
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT = 120.0  # seconds, on a machine that does other things too


def missing() -> str | None:
    """What a test in the browser lacks here, if anything."""
    import importlib.util

    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package}"
    return None if executable() else "Chromium: apt-get install chromium"


def executable() -> str | None:
    """Where the browser is."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def marks() -> list[Any]:
    """Of the tests in the browser: once, and only where there is one."""
    import pytest

    lacks = missing()
    return [pytest.mark.once, pytest.mark.skipif(lacks is not None, reason=f"needs {lacks}")]


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Server:
    """A process of the command, from the line with its address on."""

    def __init__(self, words: list[str], folder: Path | None = None, **environment: str) -> None:
        command = [sys.executable, "-m", "tokenflow_ext.train.cli", "demo", "--port", "0", *words]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # What a shell starts in the background ignores Ctrl-C, and so do its children.
            preexec_fn=_hear_ctrl_c,
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.address = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(WAIT) or not self.address:
            self.process.kill()
            raise RuntimeError(f"the demo has not started:\n{self.said}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "(Ctrl-C ends it)" in line:
                self.address = line.split()[0]
                self._ready.set()
        self._ready.set()

    @property
    def said(self) -> str:
        """All that it has printed."""
        return "".join(self.lines)

    def stop(self, by: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C; gives the exit status."""
        self.process.send_signal(by)
        status = self.process.wait(WAIT)
        self._reader.join(WAIT)
        return status

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # its temporary files go with it
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser, with an empty profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=executable(), args=list(QUIET))
        try:
            yield found
        finally:
            found.close()


def open_page(
    found: Any, address: str, height: int = 1000, ready: str = ".tf-all-steps .tf-step img"
) -> tuple[Any, list[str]]:
    """The page with a first picture in it, and the addresses of all that it asks for.

    Args:
        ready: what is there as soon as the page can be used.
    """
    page = found.new_context(viewport={"width": 1280, "height": height}).new_page()
    page.set_default_timeout(1000 * WAIT)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector(ready)
    return page, asked


def shown(page: Any, selector: str) -> np.ndarray:
    """The pixels of the last picture in a piece of the page."""
    source = page.locator(f"{selector} img").last.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def codes(page: Any) -> list[int]:
    """The codes of all tokens that are shown, by their numbers."""
    found = page.locator(".tf-all-steps .tf-token").evaluate_all(
        "all => all.map(x => [Number(x.dataset.number), x.title])"
    )
    return [int(title.split()[1].rstrip(",")) for _, title in sorted(found)]


def wait_for_other(page: Any, selector: str, action: Callable[[], Any]) -> None:
    """Do something, and wait until a piece of the page has changed, in any of its tabs."""
    selector += " .tf"  # without the sign that something is going on
    script = "all => [...document.querySelectorAll(all)].map((one) => one.innerHTML).join()"
    before = page.evaluate(script, selector)
    action()
    page.wait_for_function(
        f"([selector, before]) => ({script})(selector) != before", arg=[selector, before]
    )


def upload(page: Any, file: Path) -> None:
    """Drop a file in the first place for one that can be seen."""
    page.locator("input[type=file]").first.set_input_files(file)


def draw_picture(file: Path, side: int = 70) -> Path:
    """A picture that is none of the examples."""
    y, x = np.mgrid[0:side, 0:60]
    pixels = np.stack([x * 4, y * 210 // side, 255 - x * 2], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def take_picture(run: str, file: Path, example: int = 1, code: int = 700) -> None:
    """The tab *reconstruct* of a run, with an example and a token swapped, as a PNG file."""
    with Server(["--checkpoint", run]) as server, browser() as found:
        page, _ = open_page(found, server.address)
        first = page.locator(".tf-comparison").first.inner_text()
        page.locator(f".tf-examples button[data-number='{example}']").first.click()
        page.wait_for_function(
            "first => document.querySelector('.tf-comparison').innerText != first", arg=first
        )
        page.locator(".tf-all-steps .tf-step:nth-child(3) .tf-token").nth(4).click()
        page.wait_for_selector("text=at 3 × 3, row 2, column 2")
        page.get_by_label("or any code").fill(str(code))
        page.get_by_role("button", name="Put it in").click()
        page.wait_for_selector("text=1 token swapped")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # until nothing fades any more
        content = page.screenshot(full_page=True)
        server.stop()
    with Image.open(io.BytesIO(content)) as image:
        # Even levels alone: nobody sees it, and the file is a seventh smaller.
        even = image.convert("RGB").point(lambda level: 255 if level == 255 else (level + 1) & 0xFE)
        even.save(file, optimize=True)


if __name__ == "__main__":
    take_picture(sys.argv[1], Path(sys.argv[2]))
