"""An analysis of codebooks: which images share a code, and how many codes any image has.

docs/guides/analysis.md says what is written.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.metrics import code_usage
from tokenflow_ext.train.data.image_files import PREPROCESSING
from tokenflow_ext.train.data.outputs import Outputs, distinct_names, png
from tokenflow_ext.train.data.text_files import printable
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.logs import table

from .cluster_pictures import new_figure, plot, sheet_of
from .clusters import CODEBOOKS, Clusters, assign, codebooks_of
from .preprocess import CenterCropDataset, crops_of
from .report import environment

FORMAT = "tokenflow-analysis"
VERSION = 1

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


def names_of(sources: Sequence[str]) -> list[str]:
    """A name for each checkpoint path: its folder's; with the run's before it where it is one of
    several, and numbered where two would be alike."""
    names: list[str] = []
    for source in sources:
        path = Path(source)
        name = path.name or path.resolve().name
        if path.parent.name == "checkpoints":
            name = f"{path.parent.parent.name}-{name}"
        elif path.parent.name == "snapshots":  # in the hub's cache: models--ORG--NAME
            name = path.parent.parent.name.rpartition("--")[2]
        names.append(name)
    return distinct_names(names, "-semantic.png")


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
    dtype: str = "float32",
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
        dtype: of the encoders' arithmetic.

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
    found: list[tuple[Clusters, CenterCropDataset]] = []
    tokenizers = []
    for name, source in zip(names, sources, strict=True):
        model, place = checkpoint.load_tokenizer(source, resolution)
        model.config.need_one_index("the analysis of codebooks")
        model.to(group.device)
        codebooks = codebooks_of(model, asked)
        if not codebooks:
            raise ConfigError(
                f"{source} has no codebook {' or '.join(asked or CODEBOOKS)}: its branches are "
                f"{', '.join(model.config.branches)}"
            )
        images = crops_of(folder, limit, model.config.image_size)
        assigned, digest = assign(
            model, images, codebooks, group, batch=batch, workers=workers, dtype=dtype
        )
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
        sheet, listed = sheet_of(entry, images, shown, columns)
        picture = f"{entry.name}-{entry.by}.png"
        content[picture] = png(sheet)
        analyses.append(_facts(entry) | {"picture": picture, "largest": listed})
    notes = _notes(clusters, folder)
    report = {
        "format": FORMAT,
        "version": VERSION,
        "definition": DEFINITION,
        "analyses": analyses,
        "tokenizers": tokenizers,
        "data": {"folder": folder, "images": len(images)},
        "notes": notes,
        "paper": PAPER,
        "environment": environment(group) | {"batch": batch, "dtype": dtype},
    }
    with target.together():
        for name, one in content.items():
            target.write(name, one)
        target.remove(set(files) - set(content))
        path = target.write_json("analysis.json", report)
    print(table(_rows(analyses)))
    for text in (f"paper: {PAPER['note']}", *notes):
        print(textwrap.fill(text, 100))
    print(path)
    return report


__getattr__ = renamed(
    __name__,
    {
        "nearest": "tokenflow_ext.train.evaluation.clusters:nearest",
        "cluster_sheet": "tokenflow_ext.train.evaluation.cluster_pictures:cluster_sheet",
        "PhotographSquares": "tokenflow_ext.train.evaluation.preprocess:PhotographCrops",
        "add_arguments": "tokenflow_ext.train.cli.commands.analyse:add_arguments",
        "command": "tokenflow_ext.train.cli.commands.analyse:run",
    },
)
