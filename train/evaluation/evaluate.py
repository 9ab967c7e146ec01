"""An evaluation: how well a tokenizer reconstructs, with everything that decides a metric.

Preprocessing, definitions, weights, data and versions are printed or saved with the metrics, so
that somebody else's run can be the same one. docs/guides/evaluation.md says what each metric is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import WeightsError
from tokenflow_ext.models.metrics import cosine
from tokenflow_ext.train.data import DataError, list_images
from tokenflow_ext.train.data.image_files import PREPROCESSING
from tokenflow_ext.train.data.outputs import Outputs
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.precision import arithmetic

from .metrics import EIGHT_BITS, METRICS, PAPER, Reconstruction, evaluate
from .networks import choose_features, choose_head, choose_perceptual, choose_teacher
from .preprocess import evenly_spread
from .probe import class_of, why_not
from .report import FILES, as_table, environment, notes, write
from .zero_shot import name_embeddings

FORMAT = "tokenflow-evaluation"
VERSION = 1


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
    clip: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Evaluate the tokenizer at ``source`` on the images below ``folder``, print and write.

    Args:
        resolution: see :meth:`TokenFlowTokenizer.from_pretrained`.
        clip: :data:`.zero_shot.WANTED`; None leaves zero-shot classification out.
        dtype: of the tokenizer's arithmetic; what measures is in float32.

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
    found = list_images(folder)
    model, place = checkpoint.load_tokenizer(source, resolution)
    model.to(group.device)
    paths = evenly_spread(found, limit)
    size, codes = model.config.image_size, model.quantizer.num_codes
    features = perceptual = None
    network, missing = choose_teacher(model.config, teacher, group.device)
    head = None
    if network is not None:
        head, no_head = choose_head(model.config, teacher, group.device)
        missing |= no_head
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
        with arithmetic(group.device, dtype):
            indices = model.encode(images)
            made, semantic = model.decode(indices)
        made = None if made is None else made.float()
        semantic = None if semantic is None else semantic.float()
        indices = model.quantizer.code_numbers(indices)
        if network is None or semantic is None:
            return Reconstruction(indices, made)
        wanted = network(images)
        same = None
        if head is not None:
            same = (head(semantic).argmax(1) == head(wanted).argmax(1)).float().mean()
        pooled = torch.stack([semantic.mean(1), wanted.mean(1)], dim=1)
        return Reconstruction(indices, made, cosine(semantic, wanted), same, pooled)

    labels: list[str] | None = None
    if network is not None:
        labels = [class_of(path, Path(folder)) for path in paths]
        if "" in labels:  # no classes are meant
            labels = None
        elif reason := why_not(labels):
            labels, missing = None, missing | {"probe": reason}
    names = None
    if clip is not None:
        if labels is None:
            raise DataError("--clip is for images in a folder for each class, and a teacher")
        names = name_embeddings(clip, sorted(set(labels)))

    result = evaluate(
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
        labels=labels,
        names=names,
    )
    if result is None:
        return None
    root = Path(folder)
    report = {
        "format": FORMAT,
        "version": VERSION,
        "figures": result.metrics,
        "missing": missing | result.missing,
        "notes": notes(result, features),
        "definitions": {name: text for name, (_, _, text) in METRICS.items()},
        "preprocessing": f"{PREPROCESSING.format(size=size)} {EIGHT_BITS}",
        "data": {
            "folder": str(root),
            "found": len(found),
            "images": len(paths),
            "chosen": "all" if len(paths) == len(found) else "evenly spread over the sorted paths",
            "sha256": result.digest,
            "identical": result.identical,
            "enlarged": result.enlarged,
        },
        "tokenizer": {
            "checkpoint": str(place),
            "sha256": checkpoint.weights_digest(place),
            "image_size": size,
            "codebook_size": codes,
            "tokens_per_image": model.quantizer.num_tokens,
        },
        "paper": PAPER,
        "environment": environment(group) | {"batch": batch, "dtype": dtype},
        "images": [
            row | {"image": Path(row["image"]).relative_to(root).as_posix()}
            for row in result.images
        ],
    }
    path = write(out, report, result, overwrite)
    print(as_table(report))
    print(path)
    return report


__getattr__ = renamed(
    __name__,
    {
        "Measured": "tokenflow_ext.train.evaluation.metrics:EvaluationResult",
        "FIGURES": "tokenflow_ext.train.evaluation.metrics:METRICS",
        "Features": "tokenflow_ext.train.evaluation.metrics:Features",
        "Squares": "tokenflow_ext.train.evaluation.preprocess:CenterCropDataset",
        "join_squares": "tokenflow_ext.train.evaluation.preprocess:collate",
        "digest_of": "tokenflow_ext.train.evaluation.preprocess:digest_of",
        "to_float": "tokenflow_ext.train.evaluation.preprocess:to_float",
        "thinned": "tokenflow_ext.train.evaluation.preprocess:evenly_spread",
        "Item": "tokenflow_ext.train.evaluation.preprocess:Item",
        "VGG16": "tokenflow_ext.train.evaluation.networks:VGG16",
        "inception_features": "tokenflow_ext.train.evaluation.networks:inception_features",
        "lite0_features": "tokenflow_ext.train.evaluation.networks:lite0_features",
        "as_page": "tokenflow_ext.train.evaluation.report:as_page",
        "add_reading_arguments": "tokenflow_ext.train.cli.options:add_reading",
        "reading": "tokenflow_ext.train.cli.options:reading",
        "add_arguments": "tokenflow_ext.train.cli.commands.evaluate:add_arguments",
        "command": "tokenflow_ext.train.cli.commands.evaluate:run",
    },
)
