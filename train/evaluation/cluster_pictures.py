"""Pictures of clusters: how many images each code has, and which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenflow_ext.models.towers.towers import MissingPackageError
from tokenflow_ext.train.data.image_files import tile
from tokenflow_ext.train.data.text_files import printable

from .clusters import Clusters
from .preprocess import CenterCropDataset


def new_figure() -> Any:
    """An empty figure of matplotlib's, without its global state.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "the plot of tokenflow analyse needs matplotlib: pip install matplotlib"
        ) from error
    return Figure(figsize=(8, 4.5), dpi=110, layout="constrained")


def plot(clusters: Sequence[Clusters]) -> Any:
    """Images of each code, largest first, on a logarithmic axis: a line for each codebook.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = new_figure()
    axis = figure.add_subplot()
    for entry in clusters:
        sizes = [count for _, count in entry.largest_first()]
        # A label that begins with "_" would not be shown, and "$" would begin mathematics.
        title = re.sub("^_", " _", printable(entry.title).replace("$", r"\$"))
        label = f"{title}: {len(sizes) / entry.codes:.1%} of {entry.codes:,}"
        axis.plot(range(1, len(sizes) + 1), sizes, label=label, drawstyle="steps-mid")
    axis.set_yscale("log")
    axis.set_xlabel("codes that any image has, by their number of images")
    axis.set_ylabel("images (logarithmic)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, title="codes filled", alignment="left")
    return figure


def cluster_sheet(rows: Sequence[tuple[str, list[np.ndarray]]], columns: int) -> np.ndarray:
    """A row for each cluster: its name, then its images, uint8 [H, W, 3].

    Args:
        rows: (name, images [S, S, 3] uint8, at most ``columns``).
    """
    side = rows[0][1][0].shape[0]
    factor = max(1, -(-64 // side))  # small images are enlarged, by repeating pixels
    font = ImageFont.load_default()
    margin = 6 + max(int(font.getlength(name)) for name, _ in rows)
    lines = []
    for name, images in rows:
        large = [image.repeat(factor, 0).repeat(factor, 1) for image in images]
        blank = [np.full_like(large[0], 255)] * (columns - len(large))
        strip = tile([*large, *blank], columns)
        line = Image.new("RGB", (margin + strip.shape[1], strip.shape[0] + 4), "white")
        ImageDraw.Draw(line).text((2, strip.shape[0] / 2), name, "black", font, anchor="lm")
        line.paste(Image.fromarray(strip), (margin, 2))
        lines.append(np.asarray(line))
    return np.concatenate(lines)


def sheet_of(
    clusters: Clusters, images: CenterCropDataset, count: int, columns: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The largest clusters' pictures, and the names of what they show."""
    rows, listed = [], []
    for code, size in clusters.largest_first()[:count]:
        members = clusters.members(code, columns)
        pixels = [images[index][1].permute(1, 2, 0).numpy() for index in members]
        rows.append((f"code {code}: {size}", pixels))
        shown = [str(images.paths[index]) for index in members]
        listed.append({"code": code, "images": size, "shown": shown})
    return cluster_sheet(rows, columns), listed
