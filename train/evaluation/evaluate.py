"""``tokenflow evaluate``: how well a tokenizer reconstructs, with everything that decides a figure.

Preprocessing, definitions, weights, data and versions are printed or saved with the figures, so
that somebody else's run can be the same one. docs/guides/evaluation.md says what each figure is.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import math
import platform
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from tokenflow_ext.models import (
    ConfigError,
    TokenizerConfig,
    TowerConfig,
    WeightsError,
)
from tokenflow_ext.models.losses.tokenizer import LPIPS
from tokenflow_ext.models.metrics import (
    FeatureSums,
    code_usage,
    cosine,
    frechet,
    psnr,
    ssim,
    to_uint8,
)
from tokenflow_ext.models.towers.teachers import build_teacher
from tokenflow_ext.train import data
from tokenflow_ext.train.data.image_files import PREPROCESSING, open_image, to_square
from tokenflow_ext.train.data.outputs import Outputs, add_overwrite, json_text, png
from tokenflow_ext.train.data.text_files import printable
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.engine.logs import over_under, table

from . import fid

FORMAT = "tokenflow-evaluation"
VERSION = 1
VGG16 = "vgg16-397923af.pth"
_LITE0_SIZE = 224
Item = TypeVar("Item")

EIGHT_BITS = (
    "Everything is measured on 8 bits: the reconstruction x in [-1, 1] becomes 127.5 x + 128, "
    "clamped to 0-255 and truncated."
)

# What each figure is: (name in the table, how it is written, definition).
FIGURES = {
    "rfid": (
        "rFID",
        "{:.3f}",
        "Frechet distance of originals' and reconstructions' 2048 pool features of FID's Inception "
        "(torch-fidelity, its bilinear resize to 299 px as in TensorFlow 1), sample covariances, "
        "float64",
    ),
    "fd_efflite0": (
        "FD-EffLite0 (not FID)",
        "{:.4f}",
        "Frechet distance of originals' and reconstructions' 112 channels of EfficientNet-Lite0 at "
        f"stride 16, averaged over the image at {_LITE0_SIZE} px (bilinear, antialiased), sample "
        "covariances, float64: a stand-in where Inception's weights are not at hand, on a scale of "
        "its own, comparable with nothing but itself",
    ),
    "psnr": (
        "PSNR, dB",
        "{:.2f}",
        "10 log10(1 / mean squared error) of pixels from 0 to 1 (range 1), mean over the images "
        "that differ from their original; the released code names no range, and scikit-image "
        "takes 1 for it: the same figure",
    ),
    "ssim": (
        "SSIM, range 1",
        "{:.4f}",
        "scikit-image's defaults (uniform 7 x 7 windows, sample covariances, mean over channels "
        "and images) on pixels from 0 to 1 with data_range=1, the range they have",
    ),
    "ssim_range_2": (
        "SSIM, range 2 (the released code's)",
        "{:.4f}",
        "the same with data_range=2 on the same pixels from 0 to 1, as the released code calls it: "
        "its constants weigh four times as much, and the figure is higher than with range 1",
    ),
    "lpips": (
        "LPIPS (VGG)",
        "{:.4f}",
        "lpips 0.1 with VGG16 and its linear heads, on [-1, 1], mean over images",
    ),
    "cosine": (
        "cosine to the teacher",
        "{:.4f}",
        "cosine of each decoded semantic token and the teacher's, mean over tokens and images",
    ),
    "usage": (
        "codes used",
        "{:.2%}",
        "share of the codebook's codes that any image chose at any scale",
    ),
    "perplexity": (
        "perplexity of the codes",
        "{:.1f}",
        "exp of the entropy of all chosen codes' shares, all scales together",
    ),
}

PAPER = {
    "note": "arXiv 2412.03069, the paper's tokenizers on ImageNet's 50,000 validation images; "
    "other data and other weights than here, unless you brought both",
    "256": {"rfid": 1.37, "psnr": 21.41, "ssim_range_2": 0.687},
    "384": {"rfid": 0.63, "psnr": 22.77, "ssim_range_2": 0.731},
}
_HEAD = ("", "here", "paper, 256 / 384 px, ImageNet")


class Reconstruction(NamedTuple):
    """What a tokenizer makes of images [B, 3, S, S] in [-1, 1].

    Attributes:
        indices: of codes, [B, L].
        images: like the originals; None without a pixel branch.
        cosine: mean cosine of decoded semantic tokens and the teacher's (0-dim); None without them.
    """

    indices: Tensor
    images: Tensor | None
    cosine: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """What a Frechet distance is of: ``extract`` takes uint8 [B, 3, H, W] and gives [B, width]."""

    figure: str
    width: int
    extract: Callable[[Tensor], Tensor]


@dataclass
class Measured:
    """Figures over all images; those that could not be had are None, and ``missing`` says why.

    Of a tokenizer that decodes no images (``decodes`` is false) every figure of images is None
    without a reason of its own.
    """

    figures: dict[str, float | None]
    missing: dict[str, str]
    identical: int
    enlarged: int
    digest: str
    images: list[dict[str, Any]]
    originals: Tensor = field(repr=False)
    made: Tensor = field(repr=False)
    decodes: bool
    shown: list[int] = field(default_factory=list)


class Squares(Dataset):
    """(number, uint8 [3, S, S], whether it was enlarged, SHA-256 of its pixels) of each image."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """The whole image."""
        return open_image(self.paths[index])

    def __getitem__(self, index: int) -> tuple[int, Tensor, bool, str]:
        image = self.open(index)
        enlarged = min(image.size) < self.size
        pixels = np.array(to_square(image, self.size))
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        return index, torch.from_numpy(pixels).permute(2, 0, 1), enlarged, digest


def join_squares(samples: list[tuple[int, Tensor, bool, str]]) -> tuple[list, Tensor, list, list]:
    indices, pixels, enlarged, digests = zip(*samples, strict=True)
    return list(indices), torch.stack(pixels), list(enlarged), list(digests)


def digest_of(digests: Iterable[str]) -> str:
    """SHA-256 of images, from each one's own (hexadecimal), in order."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], the values that training sees."""
    return pixels.float().div_(127.5).sub_(1.0)


def thinned(items: list[Item], limit: int | None) -> list[Item]:
    """At most ``limit`` of the items, evenly spread: the first images of a folder of classes would
    all be of one class."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


@torch.no_grad()
def evaluate(
    reconstruct: Callable[[Tensor], Reconstruction],
    paths: list[Path],
    size: int,
    codes: int,
    group: Processes,
    *,
    batch: int = 32,
    workers: int = 0,
    pictures: int = 16,
    features: Features | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Measured | None:
    """Measure ``reconstruct`` on every image once, dealt out to the processes of ``group``.

    Args:
        reconstruct: images [B, 3, S, S] in [-1, 1] -> what the tokenizer makes of them.
        size: S.
        codes: in the codebook.
        pictures: originals and reconstructions to keep, evenly spread.
        features: of the Frechet distance; None leaves it out.
        perceptual: (images, images) in [-1, 1] -> their mean distance; None leaves LPIPS out.

    Returns:
        The figures on the first process, None on the others.

    Raises:
        DataError: no image, one that cannot be read (figures without it would be figures of other
            data), or a reconstruction that is not finite.
    """
    if not paths:
        raise data.DataError("no image to evaluate on")
    count = min(pictures, len(paths))
    shown = [i * len(paths) // count for i in range(count)]
    hits = torch.zeros(codes, dtype=torch.int64, device=group.device)
    # Sums over the images of what a batch has as a mean.
    lpips = torch.zeros((), dtype=torch.float64, device=group.device)
    cosines = torch.zeros_like(lpips)
    sums = []  # of the originals' features and the reconstructions'
    if features is not None:
        sums = [FeatureSums(features.width, group.device) for _ in range(2)]
    rows, kept = [], []
    mine = range(group.rank, len(paths), group.world)
    # A sampler, not a distributed one: that repeats images until every process has as many.
    loader = data.read_batches(
        Squares(paths, size), join_squares, batch_size=batch, sampler=mine, num_workers=workers
    )
    with tqdm(total=len(mine), unit="image", disable=not group.first) as bar:
        for indices, pixels, enlarged, digests in loader:
            originals = pixels.to(group.device)
            floats = to_float(originals)
            found = reconstruct(floats)
            hits += torch.bincount(found.indices.flatten(), minlength=codes)
            if found.cosine is not None:
                cosines += found.cosine.double() * len(originals)
            bar.update(len(indices))
            if found.images is None:
                nothing = [None] * len(indices)
                rows += zip(indices, nothing, nothing, nothing, enlarged, digests, strict=True)
                continue
            if not found.images.isfinite().all():  # 8 bits would hide it
                names = ", ".join(str(paths[index]) for index in indices)
                raise data.DataError(f"the reconstruction is not finite, among {names}")
            made = to_uint8(found.images)
            if features is not None:
                sums[0].add(features.extract(originals))
                sums[1].add(features.extract(made))
            if perceptual is not None:
                lpips += perceptual(to_float(made), floats).double() * len(made)
            columns = (
                indices,
                psnr(made, originals, reduction="none").tolist(),
                ssim(made, originals, reduction="none").tolist(),
                ssim(made, originals, data_range=2.0, reduction="none").tolist(),
                enlarged,
                digests,
            )
            rows += zip(*columns, strict=True)
            kept += [
                (index, original.cpu().clone(), other.cpu().clone())  # not views of the whole batch
                for index, original, other in zip(indices, originals, made, strict=True)
                if index in shown
            ]

    rows = sorted(row for part in group.gather(rows) for row in part)
    kept = sorted((k for part in group.gather(kept) for k in part), key=lambda k: k[0])
    for tensor in (hits, lpips, cosines, *(tensor for part in sums for tensor in part)):
        group.sum_(tensor)
    if not group.first:
        return None
    total = len(rows)
    figures: dict[str, float | None] = dict.fromkeys(FIGURES)
    missing = {}
    differing = []
    if decodes := found.images is not None:  # the first process has an image, and each is alike
        differing = [row[1] for row in rows if math.isfinite(row[1])]
        if differing:
            figures["psnr"] = math.fsum(differing) / len(differing)
        else:
            missing["psnr"] = "infinite: every image is identical to its original"
        figures["ssim"] = math.fsum(row[2] for row in rows) / total
        figures["ssim_range_2"] = math.fsum(row[3] for row in rows) / total
        if features is not None and total > 1:
            gaussians = [tuple(tensor.cpu() for tensor in part.gaussian()) for part in sums]
            figures[features.figure] = frechet(*gaussians)
        elif features is not None:
            missing[features.figure] = "a Frechet distance needs two images or more"
        if perceptual is not None:
            figures["lpips"] = lpips.item() / total
    if found.cosine is not None:
        figures["cosine"] = cosines.item() / total
    figures["usage"], figures["perplexity"] = code_usage(hits)
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):  # JSON has no such numbers
            figures[name], missing[name] = None, f"not finite: {value}"
    return Measured(
        figures=figures,
        missing=missing,
        identical=total - len(differing) if decodes else 0,
        enlarged=sum(row[4] for row in rows),
        digest=digest_of(row[5] for row in rows),
        images=[
            {
                "image": str(paths[row[0]]),
                "psnr": row[1] if decodes and math.isfinite(row[1]) else None,
                "ssim": row[2],
                "ssim_range_2": row[3],
                "sha256": row[5],
            }
            for row in rows
        ],
        originals=torch.stack([k[1] for k in kept]) if kept else torch.empty(0),
        made=torch.stack([k[2] for k in kept]) if kept else torch.empty(0),
        decodes=decodes,
        shown=[k[0] for k in kept],
    )


# -- what the figures need ------------------------------------------------------------------------


def inception_features(weights: str | None, device: torch.device) -> Features:
    """Of FID: see ``fid.inception``."""
    network = fid.inception(weights).to(device)
    return Features("rfid", 2048, lambda pixels: network(pixels)[0])


def lite0_features(device: torch.device) -> Features:
    """Of FD-EffLite0.

    Raises:
        WeightsError: the package with the weights is not installed.
    """
    config = TowerConfig("efficientnet_lite0", _LITE0_SIZE, 16, width=112)
    network = build_teacher(config).to(device, memory_format=torch.channels_last)

    def extract(pixels: Tensor) -> Tensor:
        size = (_LITE0_SIZE, _LITE0_SIZE)
        images = F.interpolate(to_float(pixels), size, mode="bilinear", antialias=True)
        return network(images).mean(dim=1)

    return Features("fd_efflite0", 112, extract)


def choose_features(
    weights: str | None, device: torch.device
) -> tuple[Features | None, dict[str, str]]:
    """Inception's features, else the stand-in's, else none; and why those before were not had.

    Raises:
        WeightsError: ``weights`` was given and is not Inception's.
    """
    missing = {}
    try:
        return inception_features(weights, device), missing
    except WeightsError as error:
        if weights is not None:
            raise
        missing["rfid"] = str(error)
    try:
        return lite0_features(device), missing
    except WeightsError as error:
        missing["fd_efflite0"] = str(error)
    return None, missing


def choose_perceptual(
    weights: str | None, device: torch.device
) -> tuple[LPIPS | None, dict[str, str]]:
    """LPIPS with the VGG16 file given or in torch's cache, or why there is none.

    Raises:
        WeightsError: ``weights`` was given and is not VGG16's.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16
    if weights is None and not cached.is_file():
        wanted = f"LPIPS needs torchvision's VGG16 weights: no file {cached}; put {VGG16} there, or"
        return None, {"lpips": f"{wanted} name it with --vgg16 FILE"}
    try:
        return LPIPS(cached if weights is None else weights).to(device), {}
    except (WeightsError, ImportError) as error:
        if weights is not None:
            raise WeightsError(str(error)) from error
        return None, {"lpips": str(error)}


def choose_teacher(
    config: TokenizerConfig, weights: str | None, device: torch.device
) -> tuple[nn.Module | None, dict[str, str]]:
    """The tokenizer's teacher, or why there is none; neither where it was trained without one.

    Raises:
        WeightsError: ``weights`` was given and is not the teacher's.
        ConfigError: ``weights`` was given for a tokenizer without a teacher.
    """
    if not config.teacher.enabled:
        if weights is not None:
            raise ConfigError(f"--teacher {weights}: the tokenizer was trained without a teacher")
        return None, {}
    try:
        return build_teacher(config.teacher, weights).to(device), {}
    except WeightsError as error:
        if weights is not None:
            raise
        return None, {"cosine": f"{error} (--teacher FILE)"}


# -- what people and files see --------------------------------------------------------------------


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table's rows: a figure that is neither there nor asked for in vain has none."""
    rows = [_HEAD]
    for name, (label, written, _) in FIGURES.items():
        value = report["figures"][name]
        if value is None and name not in report["missing"]:
            continue
        known = [PAPER[size].get(name) for size in ("256", "384")]
        paper = "" if None in known else " / ".join(f"{number:g}" for number in known)
        rows.append((label, "-" if value is None else written.format(value), paper))
    return rows


def _sentences(report: dict[str, Any]) -> list[str]:
    """What must be known to read the figures."""
    facts, tokenizer = report["data"], report["tokenizer"]
    sentences = [
        f"tokenizer: {tokenizer['checkpoint']}, {tokenizer['image_size']} px, weights' SHA-256 "
        f"{tokenizer['sha256'][:16]}",
        f"data: {facts['images']} images of {facts['found']} below {facts['folder']}, pixels' "
        f"SHA-256 {facts['sha256'][:16]}",
        f"preprocessing: {report['preprocessing']}",
        f"paper: {PAPER['note']}",
        *(f"{FIGURES[name][0]}: {why}" for name, why in report["missing"].items()),
        *report["notes"],
    ]
    return [printable(sentence) for sentence in sentences]


def as_table(report: dict[str, Any]) -> str:
    """The figures beside the paper's, and what must be known to read them."""
    lines = [line.rstrip() for line in table(_rows(report)).splitlines()]
    wrap = {"width": 100, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join([*lines, *(textwrap.fill(text, **wrap) for text in _sentences(report))])


def _data_uri(pixels: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
table { border-collapse: collapse; }
td, th { padding: .2em 1em .2em 0; text-align: left; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5em; } figure { margin: 0; }
figure img { width: 192px; image-rendering: auto; } figcaption { max-width: 390px; }
dt { font-weight: bold; }
"""


def as_page(report: dict[str, Any], measured: Measured) -> str:
    """A page of HTML that needs no other file: figures, pictures with their PSNR, definitions."""
    head, *body = ([html.escape(cell) for cell in row] for row in _rows(report))
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    pictures = []
    for index, original, made in zip(
        measured.shown, measured.originals, measured.made, strict=True
    ):
        facts = report["images"][index]
        value = "identical" if facts["psnr"] is None else f"{facts['psnr']:.2f} dB"
        name = html.escape(printable(facts["image"]))
        pictures.append(
            f'<figure><img alt="original" src="{_data_uri(original)}"> '
            f'<img alt="reconstruction" src="{_data_uri(made)}">'
            f"<figcaption>{name}: {value}</figcaption></figure>"
        )
    definitions = "".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>"
        for label, _, text in FIGURES.values()
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
    out: str | Path, report: dict[str, Any], measured: Measured, overwrite: bool = False
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
        if measured.shown:
            sheet = over_under(to_float(measured.originals), to_float(measured.made))
            target.write("pictures.png", png(sheet))
        else:
            target.remove(["pictures.png"])
        target.write("pictures.html", as_page(report, measured).encode())
        return target.write_json("metrics.json", facts)


def _notes(measured: Measured, features: Features | None) -> list[str]:
    count, notes = len(measured.images), []
    if not measured.decodes:
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
    if measured.identical:
        notes.append(f"identical to their original, left out of PSNR's mean: {measured.identical}")
    if measured.enlarged:
        notes.append(f"smaller than the tokenizer's size, enlarged: {measured.enlarged}")
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


def run(
    source: str,
    folder: str,
    out: str,
    group: Processes,
    *,
    resolution: int | None = None,
    batch: int = 32,
    limit: int | None = None,
    workers: int = 0,
    pictures: int = 16,
    inception: str | None = None,
    vgg16: str | None = None,
    teacher: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Evaluate the tokenizer at ``source`` on the images below ``folder``, print and write.

    Args:
        resolution: see :meth:`TokenFlowTokenizer.from_pretrained`.

    Returns:
        What metrics.json and images.jsonl hold (on the first process).

    Raises:
        CheckpointError, DataError, WeightsError: one that is missing or cannot be read.
        OutputError: a report is there already, and ``overwrite`` is false.
    """
    with group.together():
        if group.first:
            Outputs(Path(out), overwrite).claim(FILES)
    checkpoint.check_there(source)
    found = data.list_images(folder)
    model, place = checkpoint.load_tokenizer(source, resolution)
    model.to(group.device)
    paths = thinned(found, limit)
    size, codes = model.config.image_size, model.quantizer.codebook_size
    features = perceptual = None
    network, missing = choose_teacher(model.config, teacher, group.device)
    if model.config.pixel.enabled:
        features, more = choose_features(inception, group.device)
        perceptual, yet_more = choose_perceptual(vgg16, group.device)
        missing |= more | yet_more
    if any(other != missing for other in group.gather(missing)):
        raise WeightsError(
            "the processes do not find the same weights: put them on every machine, or name them "
            "with --weights FILE, --vgg16 FILE and --teacher FILE"
        )

    def reconstruct(images: Tensor) -> Reconstruction:
        indices = model.encode(images)
        made, semantic = model.decode(indices)
        likeness = None if network is None else cosine(semantic, network(images))
        return Reconstruction(indices, made, likeness)

    measured = evaluate(
        reconstruct,
        paths,
        size,
        codes,
        group,
        batch=batch,
        workers=workers,
        pictures=pictures,
        features=features,
        perceptual=perceptual,
    )
    if measured is None:
        return None
    root = Path(folder)
    report = {
        "format": FORMAT,
        "version": VERSION,
        "figures": measured.figures,
        "missing": missing | measured.missing,
        "notes": _notes(measured, features),
        "definitions": {name: text for name, (_, _, text) in FIGURES.items()},
        "preprocessing": f"{PREPROCESSING.format(size=size)} {EIGHT_BITS}",
        "data": {
            "folder": str(root),
            "found": len(found),
            "images": len(paths),
            "chosen": "all" if len(paths) == len(found) else "evenly spread over the sorted paths",
            "sha256": measured.digest,
            "identical": measured.identical,
            "enlarged": measured.enlarged,
        },
        "tokenizer": {
            "checkpoint": str(place),
            "sha256": checkpoint.weights_digest(place),
            "image_size": size,
            "codebook_size": codes,
            "tokens_per_image": model.quantizer.num_tokens,
        },
        "paper": PAPER,
        "environment": environment(group) | {"batch": batch},
        "images": [
            row | {"image": Path(row["image"]).relative_to(root).as_posix()}
            for row in measured.images
        ],
    }
    path = write(out, report, measured, overwrite)
    print(as_table(report))
    print(path)
    return report


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """``--limit``, ``--batch-size``, ``--workers``, ``--device`` of a command over many images."""
    parser.add_argument("--limit", type=int, metavar="N", help="so many, evenly spread [all]")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images at once in a process [%(default)s]"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode images, each [%(default)s]"
    )
    parser.add_argument("--device", default="auto", help="[%(default)s]")


def reading(known: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_reading_arguments` read, but for the device, as arguments of ``run``.

    Raises:
        DataError: a number that is too small.
    """
    data.check_counts(known, limit=1, batch_size=1, workers=0)
    return {"limit": known.limit, "batch": known.batch_size, "workers": known.workers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tokenflow evaluate``."""
    checkpoint.add_tokenizer_arguments(parser)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="searched in depth")
    parser.add_argument("--out", default="evaluation", metavar="DIR", help="[%(default)s]")
    add_overwrite(parser)
    add_reading_arguments(parser)
    parser.add_argument(
        "--pictures", type=int, default=16, metavar="N", help="on the page [%(default)s]"
    )
    parser.add_argument("--weights", metavar="FILE", help=f"for FID: {fid.WEIGHTS}")
    parser.add_argument("--vgg16", metavar="FILE", help=f"for LPIPS: {VGG16}")
    parser.add_argument("--teacher", metavar="FILE", help="the teacher's weights, for the cosine")


def command(known: argparse.Namespace) -> None:
    """``tokenflow evaluate``; under torchrun, one process of it."""
    data.check_counts(known, pictures=0)
    many = reading(known)
    with processes(known.device) as group:
        run(
            known.checkpoint,
            known.data,
            known.out,
            group,
            resolution=known.resolution,
            pictures=known.pictures,
            inception=known.weights,
            vgg16=known.vgg16,
            teacher=known.teacher,
            overwrite=known.overwrite,
            **many,
        )
