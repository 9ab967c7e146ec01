"""``tokenflow analyse``: which images share a code, and how many codes any image has.

Every image's features are averaged over the grid and given their nearest code, in the semantic
codebook alone, in the pixel codebook alone, and in both together, as the quantizer searches (arXiv
2412.03069, figures 4 and 7). docs/guides/analysis.md says what is written.
"""

from __future__ import annotations

import argparse
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from tokenflow_ext import nearest_code
from tokenflow_ext.models import ConfigError, TokenFlowTokenizer
from tokenflow_ext.models.metrics import code_usage
from tokenflow_ext.models.towers.towers import MissingPackageError
from tokenflow_ext.train import data
from tokenflow_ext.train.data.image_files import PREPROCESSING, open_image, tile
from tokenflow_ext.train.data.outputs import Outputs, add_overwrite, distinct_names, png
from tokenflow_ext.train.data.text_files import printable
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.engine.logs import table

from .evaluate import (
    Squares,
    add_reading_arguments,
    digest_of,
    environment,
    join_squares,
    reading,
    thinned,
    to_float,
)

FORMAT = "tokenflow-analysis"
VERSION = 1
CODEBOOKS = ("joint", "semantic", "pixel")

DEFINITION = (
    "features before quantization, averaged over the grid to one vector an image; its nearest code "
    "by the quantizer's own distance: of the semantic codebook alone, of the pixel codebook alone, "
    "or (joint) of all the tokenizer's codebooks; filled is the share of codes that any image has"
)
PAPER = {
    "note": "arXiv 2412.03069, figure 7: tokenizers of their own with 8,192 codes, on ImageNet's "
    "validation images; other data, weights and codebooks than here",
    "TokenFlow": 0.874,
    "VQKD": 0.271,
    "VQGAN": 0.025,
}

# What is written besides a picture for each codebook.
_FILES = ("clusters.png", "clusters.svg", "analysis.json")

# The built-in photographs' squares, along their shorter side, if they lay edge to edge.
_SQUARES_A_SIDE = 8


@dataclass(frozen=True)
class Clusters:
    """The images of a data set by their code in one codebook.

    Attributes:
        name: of the tokenizer.
        by: ``joint``, ``semantic`` or ``pixel``.
        codes: K.
        assigned: each image's code, [N] int64 on the CPU.
    """

    name: str
    by: str
    codes: int
    assigned: Tensor

    @property
    def title(self) -> str:
        """The tokenizer and the codebook."""
        return f"{self.name}, {self.by}"

    @property
    def counts(self) -> Tensor:
        """Images of each code, [K] int64."""
        return torch.bincount(self.assigned, minlength=self.codes)

    def largest_first(self) -> list[tuple[int, int]]:
        """(code, images) of every code that has any; the lower code first on a tie."""
        counts, order = self.counts.sort(descending=True, stable=True)
        pairs = zip(order.tolist(), counts.tolist(), strict=True)
        return [(code, count) for code, count in pairs if count]

    def members(self, code: int, limit: int) -> list[int]:
        """The numbers of a code's images, at most ``limit``, evenly spread over the data."""
        found = (self.assigned == code).nonzero().flatten().tolist()
        return thinned(found, limit)


def codebooks_of(model: TokenFlowTokenizer, asked: Sequence[str] | None) -> list[str]:
    """Those of ``asked`` that the tokenizer has; by default all that differ.

    With one branch there is one codebook, ``joint`` by another name.
    """
    branches = model.config.branches
    if asked is None:
        return [by for by in CODEBOOKS if by in branches or (by == "joint" and len(branches) > 1)]
    return [by for by in CODEBOOKS if by in asked and (by == "joint" or by in branches)]


def nearest(model: TokenFlowTokenizer, h: Tensor, by: str) -> Tensor:
    """The code of each image's mean feature.

    Args:
        h: features [B, sum(dims), rows, columns], as ``model.features`` gives them.
        by: the codebook to look in; the tokenizer must have it.

    Returns:
        [B] int64.
    """
    branches, quantizer = model.config.branches, model.quantizer
    groups = range(len(branches)) if by == "joint" else (branches.index(by),)
    means = h.mean(dim=(2, 3)).float().split(quantizer.dims, dim=1)
    return nearest_code(
        torch.cat([means[g] for g in groups], dim=1),
        torch.cat([quantizer.codebooks[g].float() for g in groups], dim=1),
        [quantizer.dims[g] for g in groups],
        # A group's weight says how it counts beside the others: alone it is all there is.
        [quantizer.weights[g] for g in groups] if by == "joint" else None,
        quantizer.l2_norm,
    )


# -- the images -----------------------------------------------------------------------------------


class PhotographSquares(Squares):
    """The built-in photographs, cut into squares of an eighth of their shorter side, each moved by
    half of that: 3,225, so that there are more of them than the small presets' codes."""

    def __init__(self, size: int, limit: int | None = None) -> None:
        crops: list[tuple[Image.Image, tuple[int, int, int, int], Path]] = []
        for path in data.photographs():
            image = open_image(path)
            side = min(image.size) // _SQUARES_A_SIDE
            for y in range(0, image.height - side + 1, side // 2):
                for x in range(0, image.width - side + 1, side // 2):
                    name = Path(f"{path.stem} {x},{y}")
                    crops.append((image, (x, y, x + side, y + side), name))
        self.crops = thinned(crops, limit)
        super().__init__([name for _, _, name in self.crops], size)

    def open(self, index: int) -> Image.Image:
        """The square, at its own size."""
        image, box, _ = self.crops[index]
        return image.crop(box)


def _images(folder: str | None, limit: int | None, size: int) -> Squares:
    if folder is None:
        return PhotographSquares(size, limit)
    return Squares(thinned(data.list_images(folder), limit), size)


@torch.no_grad()
def assign(
    model: TokenFlowTokenizer,
    images: Squares,
    codebooks: Sequence[str],
    group: Processes,
    *,
    batch: int = 32,
    workers: int = 0,
) -> tuple[Tensor, str]:
    """The code of every image in each codebook; the images are dealt out to the processes.

    Returns:
        ([len(codebooks), N] int64 on the CPU, SHA-256 of the images' pixels), on every process.
    """
    mine = range(group.rank, len(images), group.world)
    loader = data.read_batches(
        images, join_squares, batch_size=batch, sampler=mine, num_workers=workers
    )
    with tqdm(total=len(mine), unit="image", disable=not group.first) as bar:
        found = []
        for indices, pixels, _, digests in loader:
            h = model.features(to_float(pixels.to(group.device)))
            codes = [nearest(model, h, by).tolist() for by in codebooks]
            found += zip(indices, digests, *codes, strict=True)
            bar.update(len(indices))
    rows = sorted(row for part in group.gather(found) for row in part)
    codes = torch.tensor([row[2:] for row in rows]).T
    return codes, digest_of(row[1] for row in rows)


# -- what people and files see --------------------------------------------------------------------


def names_of(sources: Sequence[str]) -> list[str]:
    """A name for each checkpoint path: its folder's; with the run's before it where it is one of
    several, and numbered where two would be alike."""
    names: list[str] = []
    for source in sources:
        path = Path(source)
        name = path.name or path.resolve().name
        if path.parent.name == "checkpoints":
            name = f"{path.parent.parent.name}-{name}"
        names.append(name)
    return distinct_names(names, "-semantic.png")


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


def _sheet_of(
    clusters: Clusters, images: Squares, count: int, columns: int
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


def _rows(analyses: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    rows = [("codes filled", "", "largest cluster")]
    for entry in analyses:
        of = f"{entry['filled']:.1%} ({entry['codes_filled']:,} of {entry['codebook_size']:,})"
        largest = f"{entry['clusters'][0][1]:,} of {entry['images']:,} images"
        rows.append((printable(f"{entry['tokenizer']}, {entry['by']}"), of, largest))
    for name in ("TokenFlow", "VQKD", "VQGAN"):
        rows.append((f"the paper's {name}, 8,192 codes, ImageNet", f"{PAPER[name]:.1%}", "-"))
    return rows


def _facts(clusters: Clusters) -> dict[str, Any]:
    pairs = clusters.largest_first()
    filled, perplexity = code_usage(clusters.counts)
    return {
        "tokenizer": clusters.name,
        "by": clusters.by,
        "codebook_size": clusters.codes,
        "images": len(clusters.assigned),
        "codes_filled": len(pairs),
        "filled": filled,
        "perplexity": perplexity,
        "clusters": pairs,
    }


def _notes(clusters: Sequence[Clusters], folder: str | None) -> list[str]:
    notes = []
    for codes, images in sorted({(c.codes, len(c.assigned)) for c in clusters}):
        if images < codes:
            notes.append(
                f"{images:,} images for {codes:,} codes: no more than {images / codes:.1%} can be "
                "filled"
            )
        elif images < 10 * codes:
            notes.append(
                f"{images:,} images for {codes:,} codes: so few leave codes empty that more would "
                "fill"
            )
    if folder is None:
        notes.append(
            "squares of eleven photographs, which the demonstration's tokenizer was trained on but "
            "for a band of each: a trial of the method, no data set"
        )
    return notes


def run(
    sources: Sequence[str],
    folder: str | None,
    out: str,
    group: Processes,
    *,
    resolution: int | None = None,
    asked: Sequence[str] | None = None,
    limit: int | None = None,
    batch: int = 32,
    workers: int = 0,
    shown: int = 8,
    columns: int = 10,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Analyse the tokenizers at ``sources`` on the images below ``folder``, print and write.

    Args:
        folder: None takes squares of the built-in photographs.
        resolution: see :meth:`TokenFlowTokenizer.from_pretrained`.
        asked: codebooks, of ``joint``, ``semantic``, ``pixel``; None is all that a tokenizer has.
        limit: so many of the images, evenly spread.
        shown: clusters in a picture.
        columns: images shown of a cluster.

    Returns:
        What analysis.json holds (on the first process).

    Raises:
        CheckpointError, DataError: one that is missing or cannot be read.
        ConfigError: a tokenizer has none of the codebooks asked for.
        MissingPackageError: matplotlib is not installed.
        OutputError: one of the files is there already, and ``overwrite`` is false.
    """
    new_figure()  # where matplotlib is missing, say so before the work
    names, target = names_of(sources), Outputs(Path(out), overwrite)
    files = [f"{name}-{by}.png" for name in names for by in asked or CODEBOOKS]
    files += _FILES
    with group.together():
        if group.first:
            target.claim(files)
    for source in sources:
        checkpoint.check_there(source)
    found: list[tuple[Clusters, Squares]] = []
    tokenizers = []
    for name, source in zip(names, sources, strict=True):
        model, place = checkpoint.load_tokenizer(source, resolution)
        model.to(group.device)
        codebooks = codebooks_of(model, asked)
        if not codebooks:
            raise ConfigError(
                f"{source} has no codebook {' or '.join(asked)}: its branches are "
                f"{', '.join(model.config.branches)}"
            )
        images = _images(folder, limit, model.config.image_size)
        assigned, digest = assign(model, images, codebooks, group, batch=batch, workers=workers)
        codes = model.quantizer.codebook_size
        found += [
            (Clusters(name, by, codes, row), images)
            for by, row in zip(codebooks, assigned, strict=True)
        ]
        tokenizers.append(
            {
                "name": name,
                "checkpoint": str(place),
                "sha256": checkpoint.weights_digest(place),
                "image_size": images.size,
                "preprocessing": PREPROCESSING.format(size=images.size),
                "data_sha256": digest,
            }
        )
    if not group.first:
        return None
    clusters = [entry for entry, _ in found]
    figure, content = plot(clusters), {}
    for suffix in ("png", "svg"):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix)
        content[f"clusters.{suffix}"] = drawn.getvalue()
    analyses = []
    for entry, images in found:
        sheet, listed = _sheet_of(entry, images, shown, columns)
        picture = f"{entry.name}-{entry.by}.png"
        content[picture] = png(sheet)
        analyses.append(_facts(entry) | {"picture": picture, "largest": listed})
    report = {
        "format": FORMAT,
        "version": VERSION,
        "definition": DEFINITION,
        "analyses": analyses,
        "tokenizers": tokenizers,
        "data": {"folder": folder, "images": len(images)},
        "notes": _notes(clusters, folder),
        "paper": PAPER,
        "environment": environment(group) | {"batch": batch},
    }
    with target.together():
        for name, one in content.items():
            target.write(name, one)
        target.remove(set(files) - set(content))
        path = target.write_json("analysis.json", report)
    print(table(_rows(analyses)))
    for text in (f"paper: {PAPER['note']}", *report["notes"]):
        print(textwrap.fill(text, 100))
    print(path)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tokenflow analyse``."""
    checkpoint.add_tokenizer_arguments(parser, several=True, more="; several: compared")
    parser.add_argument(
        "--data", metavar="FOLDER", help="searched in depth [squares of the built-in photographs]"
    )
    parser.add_argument("--out", default="analysis", metavar="DIR", help="[%(default)s]")
    add_overwrite(parser)
    parser.add_argument(
        "--by",
        nargs="+",
        choices=CODEBOOKS,
        metavar="CODEBOOK",
        help=f"{', '.join(CODEBOOKS)} [all that differ]",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--clusters", type=int, default=8, metavar="N", help="in a picture [%(default)s]"
    )
    parser.add_argument(
        "--members", type=int, default=10, metavar="N", help="shown of a cluster [%(default)s]"
    )


def command(known: argparse.Namespace) -> None:
    """``tokenflow analyse``; under torchrun, one process of it."""
    data.check_counts(known, clusters=1, members=1)
    many = reading(known)
    with processes(known.device) as group:
        run(
            known.checkpoint,
            known.data,
            known.out,
            group,
            resolution=known.resolution,
            asked=known.by,
            shown=known.clusters,
            columns=known.members,
            overwrite=known.overwrite,
            **many,
        )
