"""What is measured of reconstructions, and how: definitions, and one pass over the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenflow_ext._deprecated import warn_renamed
from tokenflow_ext.models.metrics import FeatureSums, code_usage, frechet, psnr, ssim, to_uint8
from tokenflow_ext.train.data import DataError, read_batches
from tokenflow_ext.train.engine.distributed import Processes

from . import probe, zero_shot
from .preprocess import CenterCropDataset, collate, digest_of, to_float

LITE0_SIZE = 224

EIGHT_BITS = (
    "Everything is measured on 8 bits: the reconstruction x in [-1, 1] becomes 127.5 x + 128, "
    "clamped to 0-255 and truncated."
)

# What each metric is: (name in the table, how it is written, definition).
METRICS = {
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
        f"stride 16, averaged over the image at {LITE0_SIZE} px (bilinear, antialiased), sample "
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
    "semantic_top1": (
        "same class by the teacher's head",
        "{:.2%}",
        "share of images whose likeliest ImageNet class, by EfficientNet-Lite0's own last stages "
        "and classifier, is the same from the decoded semantic tokens as from the teacher's on the "
        "original",
    ),
    "probe": (
        "linear probe, decoded semantic tokens",
        "{:.2%}",
        "share of images whose class (the first folder below the data) a linear classifier names: "
        "scikit-learn's logistic regression on the standardised mean of the tokens, five-fold "
        "cross-validation",
    ),
    "probe_teacher": (
        "linear probe, the teacher's tokens",
        "{:.2%}",
        "the same of the teacher's tokens on the originals",
    ),
    "probe_floor": (
        "commonest class",
        "{:.2%}",
        "share of the commonest class: the probe's without a look",
    ),
    "zero_shot": (
        "zero-shot, decoded semantic tokens",
        "{:.2%}",
        "share of images whose class's name (the first folder below the data, in the prompt "
        "'a photo of a NAME.') is the nearest of all by the cosine of CLIP's text embedding and "
        "the mean of the decoded semantic tokens",
    ),
    "zero_shot_teacher": (
        "zero-shot, the teacher's tokens",
        "{:.2%}",
        "the same of the teacher's tokens on the originals",
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

PAPER: dict[str, Any] = {
    "note": "arXiv 2412.03069, the paper's tokenizers on ImageNet's 50,000 validation images; "
    "other data and other weights than here, unless you brought both",
    "256": {"rfid": 1.37, "psnr": 21.41, "ssim_range_2": 0.687},
    "384": {"rfid": 0.63, "psnr": 22.77, "ssim_range_2": 0.731},
}


class Reconstruction(NamedTuple):
    """What a tokenizer makes of images [B, 3, S, S] in [-1, 1].

    Attributes:
        indices: of codes, [B, L].
        images: like the originals; None without a pixel branch.
        cosine: mean cosine of decoded semantic tokens and the teacher's (0-dim); None without them.
        same_class: share of images of the same class by the teacher's head (0-dim); None without.
        pooled: means of the decoded semantic tokens and of the teacher's, [B, 2, C]; None without.
    """

    indices: Tensor
    images: Tensor | None
    cosine: Tensor | None = None
    same_class: Tensor | None = None
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """What a Frechet distance is of: ``extract`` takes uint8 [B, 3, H, W] and gives [B, width]."""

    metric: str
    width: int
    extract: Callable[[Tensor], Tensor]


@dataclass
class EvaluationResult:
    """Metrics over all images; those that could not be had are None, and ``missing`` says why.

    Of a tokenizer that decodes no images (``decodes`` is false) every metric of images is None
    without a reason of its own.
    """

    metrics: dict[str, float | None]
    missing: dict[str, str]
    identical: int
    enlarged: int
    digest: str
    images: list[dict[str, Any]]
    originals: Tensor = field(repr=False)
    made: Tensor = field(repr=False)
    decodes: bool
    shown: list[int] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, float | None]:
        """``metrics`` under its name of before."""
        warn_renamed("EvaluationResult.figures", "EvaluationResult.metrics")
        return self.metrics


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
    labels: Sequence[str] | None = None,
    names: np.ndarray | None = None,
) -> EvaluationResult | None:
    """Measure ``reconstruct`` on every image once, dealt out to the processes of ``group``.

    Args:
        reconstruct: images [B, 3, S, S] in [-1, 1] -> what the tokenizer makes of them.
        size: S.
        codes: in the codebook.
        pictures: originals and reconstructions to keep, evenly spread.
        features: of the Frechet distance; None leaves it out.
        perceptual: (images, images) in [-1, 1] -> their mean distance; None leaves LPIPS out.
        labels: the images' classes, for the linear probe; None leaves it out.
        names: embeddings of the classes' names, for zero-shot; None leaves that out.

    Returns:
        The result on the first process, None on the others.

    Raises:
        DataError: no image, one that cannot be read (metrics without it would be metrics of other
            data), or a reconstruction that is not finite.
    """
    if not paths:
        raise DataError("no image to evaluate on")
    count = min(pictures, len(paths))
    shown = [i * len(paths) // count for i in range(count)]
    hits = torch.zeros(codes, dtype=torch.int64, device=group.device)
    # Sums over the images of what a batch has as a mean.
    lpips = torch.zeros((), dtype=torch.float64, device=group.device)
    cosines, same_class = torch.zeros_like(lpips), torch.zeros_like(lpips)
    sums: list[FeatureSums] = []  # of the originals' features and the reconstructions'
    if features is not None:
        sums = [FeatureSums(features.width, group.device) for _ in range(2)]
    rows: list[tuple[Any, ...]] = []
    kept: list[tuple[int, Tensor, Tensor]] = []
    pooled: list[tuple[int, Tensor]] = []
    mine = range(group.rank, len(paths), group.world)
    # A sampler, not a distributed one: that repeats images until every process has as many.
    loader = read_batches(
        CenterCropDataset(paths, size), collate, batch_size=batch, sampler=mine, num_workers=workers
    )
    with tqdm(total=len(mine), unit="image", disable=not group.first) as bar:
        for indices, pixels, enlarged, digests in loader:
            originals = pixels.to(group.device)
            floats = to_float(originals)
            found = reconstruct(floats)
            hits += torch.bincount(found.indices.flatten(), minlength=codes)
            if found.cosine is not None:
                cosines += found.cosine.double() * len(originals)
            if found.same_class is not None:
                same_class += found.same_class.double() * len(originals)
            if found.pooled is not None:
                pooled += zip(indices, found.pooled.float().cpu(), strict=True)
            bar.update(len(indices))
            if found.images is None:
                nothing = [None] * len(indices)
                rows += zip(indices, nothing, nothing, nothing, enlarged, digests, strict=True)
                continue
            if not found.images.isfinite().all():  # 8 bits would hide it
                among = ", ".join(str(paths[index]) for index in indices)
                raise DataError(f"the reconstruction is not finite, among {among}")
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
    pooled = sorted((x for part in group.gather(pooled) for x in part), key=lambda x: x[0])
    kept = sorted((k for part in group.gather(kept) for k in part), key=lambda k: k[0])
    for tensor in (hits, lpips, cosines, same_class, *(tensor for part in sums for tensor in part)):
        group.sum_(tensor)
    if not group.first:
        return None
    total = len(rows)
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    missing: dict[str, str] = {}
    differing = []
    if decodes := found.images is not None:  # the first process has an image, and each is alike
        differing = [row[1] for row in rows if math.isfinite(row[1])]
        if differing:
            metrics["psnr"] = math.fsum(differing) / len(differing)
        else:
            missing["psnr"] = "infinite: every image is identical to its original"
        metrics["ssim"] = math.fsum(row[2] for row in rows) / total
        metrics["ssim_range_2"] = math.fsum(row[3] for row in rows) / total
        if features is not None and total > 1:
            one, other = ([tensor.cpu() for tensor in part.gaussian()] for part in sums)
            metrics[features.metric] = frechet((one[0], one[1]), (other[0], other[1]))
        elif features is not None:
            missing[features.metric] = "a Frechet distance needs two images or more"
        if perceptual is not None:
            metrics["lpips"] = lpips.item() / total
    if found.cosine is not None:
        metrics["cosine"] = cosines.item() / total
    if found.same_class is not None:
        metrics["semantic_top1"] = same_class.item() / total
    if pooled and labels is not None:
        decoded, wanted = torch.stack([x for _, x in pooled]).numpy().swapaxes(0, 1)
        metrics["probe"] = probe.linear_probe(decoded, labels)
        metrics["probe_teacher"] = probe.linear_probe(wanted, labels)
        metrics["probe_floor"] = probe.floor(labels)
        if names is not None and names.shape[1] == decoded.shape[1]:
            metrics["zero_shot"] = zero_shot.zero_shot(decoded, labels, names)
            metrics["zero_shot_teacher"] = zero_shot.zero_shot(wanted, labels, names)
        elif names is not None:
            missing["zero_shot"] = (
                f"the text tower gives {names.shape[1]} channels, the semantic tokens have "
                f"{decoded.shape[1]}: the teacher is another model"
            )
    metrics["usage"], metrics["perplexity"] = code_usage(hits)
    for name, value in metrics.items():
        if value is not None and not math.isfinite(value):  # JSON has no such numbers
            metrics[name], missing[name] = None, f"not finite: {value}"
    return EvaluationResult(
        metrics=metrics,
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
