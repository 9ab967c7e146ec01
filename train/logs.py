"""What a person sees of a run: a progress bar, TensorBoard and JSON lines, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tokenflow_ext.train.pictures import to_pixels


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
        self._cut(start)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(
            total=total, initial=start, unit="step", disable=not progress, dynamic_ncols=True
        )

    def _cut(self, start: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # the last line of a killed process
                continue
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def advance(self) -> None:
        """One optimizer step is done."""
        self.bar.update()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(text)

    def values(self, step: int, values: dict[str, float], kind: str) -> None:
        """Log scalars of a step; ``kind`` ("train", "held_out" ...) is the TensorBoard prefix."""
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def show(self, values: dict[str, float]) -> None:
        """Put values beside the progress bar."""
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)

    def picture(self, step: int, path: Path, originals: torch.Tensor, made: torch.Tensor) -> None:
        """Write a picture (see ``over_under``) and show it in TensorBoard."""
        image = over_under(originals, made)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if self._board is not None:
            self._board.add_image("pictures", image, step, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        self._file.close()
        if self._board is not None:
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


def table(rows: list[tuple[str, str, str]]) -> str:
    """Rows of three cells as aligned text; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
