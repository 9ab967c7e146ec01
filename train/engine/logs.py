"""What a person sees of a run: a progress bar, TensorBoard and JSON lines, pictures."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tokenflow_ext.models.serialization.files import (
    OutputError,
    cannot_write,
    check_regular,
    replacing,
    write_file,
)
from tokenflow_ext.train.data.image_files import to_pixels

from . import checkpoint


class RunLog:
    """Writes ``log.jsonl`` and TensorBoard events of one run and moves its progress bar.

    Args:
        folder: of the run.
        start: optimizer steps already done. Lines of later steps, written by a process that was
            killed after its last checkpoint, are taken out: they will be written again.
    """

    def __init__(
        self, folder: Path, start: int, total: int, *, tensorboard: bool, progress: bool
    ) -> None:
        self.path = folder / "log.jsonl"
        if os.path.lexists(self.path):
            self._cut(start)
        try:
            # A link is not followed. Each line is written at once, so that nothing is left over.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            self._file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._board_files():
                place = str(folder / "tensorboard")
                self._board = SummaryWriter(place, purge_step=start + 1)
        self.bar = tqdm(
            total=total, initial=start, unit="step", disable=not progress, dynamic_ncols=True
        )

    def _cut(self, start: int) -> None:
        check_regular(self.path, OutputError)
        damaged, later = 0, 0
        with replacing(self.path) as part, self.path.open("rb") as old, part.open("wb") as new:
            for line in old:
                try:
                    step = json.loads(line)["step"]
                    if step <= start and line.endswith(b"\n"):
                        new.write(line)
                    else:
                        later += 1
                except (ValueError, LookupError, TypeError, RecursionError):
                    damaged += 1  # the last line of a killed process
        if later or damaged:
            tqdm.write(
                f"{self.path}: {later} lines after step {start} are taken out, to be written "
                f"again, and {damaged} that are not whole"
            )

    def advance(self) -> None:
        """One optimizer step is done."""
        self.bar.update()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(text)

    def values(self, step: int, values: dict[str, float], kind: str) -> None:
        """Log scalars of a step; ``kind`` ("train", "held_out" ...) is the TensorBoard prefix."""
        line = json.dumps({"step": step, "kind": kind, **values}).encode() + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self._board is not None:
            with self._board_files():
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    @contextmanager
    def _board_files(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path.with_name("tensorboard"), error) from error

    def show(self, values: dict[str, float]) -> None:
        """Put values beside the progress bar."""
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)

    def picture(self, step: int, path: Path, originals: torch.Tensor, made: torch.Tensor) -> None:
        """Write a picture (see ``over_under``) and show it in TensorBoard."""
        image = over_under(originals, made)
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        write_file(path, content.getvalue(), overwrite=True)
        if self._board is not None:
            with self._board_files():
                self._board.add_image("pictures", image, step, dataformats="HWC")

    def close(self) -> None:
        """Let go of the files."""
        self.bar.close()
        os.close(self._file)
        if self._board is not None:
            with self._board_files():
                self._board.close()


def over_under(
    originals: torch.Tensor, made: torch.Tensor, columns: int = 8, least: int = 128
) -> np.ndarray:
    """Originals over reconstructions, row by row, as uint8 [H, W, 3].

    Args:
        originals, made: [B, 3, S, S] in [-1, 1].
        columns: images in a row.
        least: small images are enlarged (by repeating pixels) to at least this side.
    """
    above, below = to_pixels(originals), to_pixels(made)
    count, height, width, _ = above.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = 2
    sheet = np.full(
        (rows * 2 * (height + gap) + (rows - 1) * 2 * gap, columns * (width + gap), 3),
        255,
        np.uint8,
    )
    for i in range(count):
        row, column = divmod(i, columns)
        top, left = row * (2 * (height + gap) + 2 * gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = above[i]
        top += height + gap
        sheet[top : top + height, left : left + width] = below[i]
    factor = max(1, -(-least // max(height, width)))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text, all as many; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def summary_text(
    run: Path, summary: dict[str, Any], metrics: dict[str, tuple[str, str]], head: str = ""
) -> str:
    """The end of a run for people: what was reached, the time, the paths.

    Args:
        run: its folder.
        summary: as in summary.json.
        metrics: the values of an evaluation to show: by key, (name, format).
        head: of the table's first column.
    """
    rows = [(head, "first", "last")]
    for key, (name, form) in metrics.items():
        if key in summary["last"]:
            first, last = (summary[when].get(key) for when in ("first", "last"))
            rows.append((name, "-" if first is None else form.format(first), form.format(last)))
    newest = checkpoint.available(run / "checkpoints")
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    done = f"{summary['steps']} steps, {summary['images']} images"
    picture = run / "pictures" / "final.png"
    paths = [
        ("picture", picture if picture.exists() else "-"),
        ("checkpoint", newest[-1] if newest else "-"),
        ("logs", f"{run / 'log.jsonl'}, tensorboard --logdir {run}"),
    ]
    return "\n".join(
        [
            "",
            table(rows),
            "",
            f"{done} in {minutes} min {seconds} s",
            *(f"{name:10s} {path}" for name, path in paths),
        ]
    )
