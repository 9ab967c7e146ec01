"""What people and files see of an evaluation: a table, a page, and JSON."""

from __future__ import annotations

import base64
import html
import io
import platform
import textwrap
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image
from torch import Tensor

from tokenflow_ext.train.data.outputs import Outputs, json_text, png
from tokenflow_ext.train.data.text_files import printable
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.logs import over_under, table

from .metrics import METRICS, PAPER, EvaluationResult, Features
from .preprocess import to_float

_HEAD = ("", "here", "paper, 256 / 384 px, ImageNet")


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table's rows: a metric that is neither there nor asked for in vain has none."""
    rows = [_HEAD]
    for name, (label, written, _) in METRICS.items():
        value = report["figures"][name]
        if value is None and name not in report["missing"]:
            continue
        known = [PAPER[size].get(name) for size in ("256", "384")]
        paper = "" if None in known else " / ".join(f"{number:g}" for number in known)
        rows.append((label, "-" if value is None else written.format(value), paper))
    return rows


def _sentences(report: dict[str, Any]) -> list[str]:
    """What must be known to read the metrics."""
    facts, tokenizer = report["data"], report["tokenizer"]
    sentences = [
        f"tokenizer: {tokenizer['checkpoint']}, {tokenizer['image_size']} px, weights' SHA-256 "
        f"{tokenizer['sha256'][:16]}",
        f"data: {facts['images']} images of {facts['found']} below {facts['folder']}, pixels' "
        f"SHA-256 {facts['sha256'][:16]}",
        f"preprocessing: {report['preprocessing']}",
        f"paper: {PAPER['note']}",
        *(f"{METRICS[name][0]}: {why}" for name, why in report["missing"].items()),
        *report["notes"],
    ]
    return [printable(sentence) for sentence in sentences]


def as_table(report: dict[str, Any]) -> str:
    """The metrics beside the paper's, and what must be known to read them."""
    lines = [line.rstrip() for line in table(_rows(report)).splitlines()]
    wrapper = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, *(wrapper.fill(text) for text in _sentences(report))])


def data_uri(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _shown(pixels: Tensor) -> str:
    return data_uri(Image.fromarray(pixels.permute(1, 2, 0).numpy()))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
table { border-collapse: collapse; }
td, th { padding: .2em 1em .2em 0; text-align: left; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5em; } figure { margin: 0; }
figure img { width: 192px; image-rendering: auto; } figcaption { max-width: 390px; }
dt { font-weight: bold; }
"""


def as_page(report: dict[str, Any], result: EvaluationResult) -> str:
    """A page of HTML that needs no other file: figures, pictures with their PSNR, definitions."""
    head, *body = ([html.escape(cell) for cell in row] for row in _rows(report))
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    pictures = []
    for index, original, made in zip(result.shown, result.originals, result.made, strict=True):
        facts = report["images"][index]
        value = "identical" if facts["psnr"] is None else f"{facts['psnr']:.2f} dB"
        name = html.escape(printable(facts["image"]))
        pictures.append(
            f'<figure><img alt="original" src="{_shown(original)}"> '
            f'<img alt="reconstruction" src="{_shown(made)}">'
            f"<figcaption>{name}: {value}</figcaption></figure>"
        )
    definitions = "".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>"
        for label, _, text in METRICS.values()
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>Reconstruction</title><style>{_STYLE}</style>\n<h1>Reconstruction</h1>\n"
        "<table>\n"
        + "\n".join(lines)
        + "\n</table>\n"
        + "\n".join(f"<p>{html.escape(text)}</p>" for text in _sentences(report))
        + '\n<h2>Originals and reconstructions</h2>\n<div class="pictures">\n'
        + "\n".join(pictures)
        + f"\n</div>\n<h2>What the figures are</h2>\n<dl>{definitions}</dl>\n</html>\n"
    )


#: What is written; the figures last.
FILES = ("images.jsonl", "pictures.png", "pictures.html", "metrics.json")


def write(
    out: str | Path, report: dict[str, Any], result: EvaluationResult, overwrite: bool = False
) -> Path:
    """metrics.json, images.jsonl, pictures.png (originals over reconstructions), pictures.html.

    Returns:
        The path of metrics.json, which is written last.

    Raises:
        OutputError: one of them is there, and ``overwrite`` is false.
    """
    target = Outputs(Path(out), overwrite)
    target.claim(FILES)
    facts = {key: value for key, value in report.items() if key != "images"}
    with target.together():
        target.write("images.jsonl", b"".join(json_text(row) + b"\n" for row in report["images"]))
        if result.shown:
            sheet = over_under(to_float(result.originals), to_float(result.made))
            target.write("pictures.png", png(sheet))
        else:
            target.remove(["pictures.png"])
        target.write("pictures.html", as_page(report, result).encode())
        return target.write_json("metrics.json", facts)


def notes(result: EvaluationResult, features: Features | None) -> list[str]:
    """What must be known of these images to read the metrics."""
    count, notes = len(result.images), []
    if not result.decodes:
        notes.append(
            "the tokenizer has no pixel branch: it decodes no images, and has no figures or "
            "pictures of them"
        )
    elif features is not None and count <= features.width:
        notes.append(
            f"{count} images for features of {features.width} channels: covariances without full "
            "rank; a Frechet distance of so few is biased upwards, and comparable with none of "
            "another number of images"
        )
    if result.identical:
        notes.append(f"identical to their original, left out of PSNR's mean: {result.identical}")
    if result.enlarged:
        notes.append(f"smaller than the tokenizer's size, enlarged: {result.enlarged}")
    return notes


def environment(group: Processes) -> dict[str, Any]:
    """What a figure may hang on besides its definition."""
    cuda = group.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(group.device) if cuda else "cpu",
        "processes": group.world,
        # Convolutions in TF32 keep 10 bits of a factor's mantissa; PyTorch allows them by default.
        "tf32_convolutions": cuda and torch.backends.cudnn.allow_tf32,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }
