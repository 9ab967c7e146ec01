"""How often a model draws what it is asked for, by a judge trained on real pictures, and what the
model itself says of its drawings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.models.serialization.transformers_folder import answers
from tokenflow_ext.models.understanding.chat import IMAGE
from tokenflow_ext.train.data import DataError, captions
from tokenflow_ext.train.data.image_files import tile
from tokenflow_ext.train.data.outputs import Outputs, png
from tokenflow_ext.train.data.text_files import say
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.logs import table
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator, ImageGenerator

from .judge import Judge, attributes, shares, train_judge

FILES = ("drawings.png", "drawings.json")
#: What easy-VQA's captions say, and questions of its own about it.
CAPTION = r"a (?P<colour>\w+) (?P<shape>\w+)"
QUESTIONS = {"colour": "what color is the shape?", "shape": "what shape is in the image?"}
EACH = 20
AnyGenerator = ImageGenerator | ClassImageGenerator


@dataclass(frozen=True)
class Drawn:
    """Drawings of a model.

    Attributes:
        prompts: of each drawing.
        images: [N, 3, S, S] uint8.
        judged: what the judge sees in each.
        answers: what the model itself answers about each; empty where it does not answer.
    """

    prompts: list[str]
    images: Tensor
    judged: list[dict[str, str]]
    answers: list[dict[str, str]]


def read_pairs(folder: str | Path, size: int) -> tuple[Tensor, list[str]]:
    """Pictures [N, 3, S, S] in [-1, 1] with their captions.

    Raises:
        DataError: none there.
    """
    source = captions.Pictures(Path(folder), size)
    return torch.stack([source[i].picture for i in range(len(source))]), source.captions_up_to(
        len(source)
    )


def _floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@torch.no_grad()
def _reconstructed(generator: AnyGenerator, images: Tensor) -> Tensor:
    """What the image tokenizer makes of pictures, as its drawings are: 8 bits."""
    tokenizer, parts = generator.model.tokenizer, []
    for part in images.split(generator.batch):
        image, _ = tokenizer.decode(tokenizer.encode(part.to(generator.model.device)))
        assert image is not None  # a text-to-image model's
        parts.append(to_uint8(image).cpu())
    return torch.cat(parts)


def _answers(
    place: str, drawn: Tensor, questions: Mapping[str, str], generator: AnyGenerator
) -> list[dict[str, str]]:
    """The model's own answers about pictures [N, 3, S, S] uint8."""
    from .answering import Answerer  # needs transformers

    model = Answerer(place, generator.model.device, generator.dtype)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in drawn]
    found: list[dict[str, str]] = [{} for _ in pictures]
    for name, question in questions.items():
        chat = [{"role": "user", "content": f"{IMAGE}\n{question}"}]
        for start in range(0, len(pictures), generator.batch):
            part = pictures[start : start + generator.batch]
            said = model.answer([chat] * len(part), [[one] for one in part], new=8)
            for row, answer in zip(found[start:], said, strict=False):
                row[name] = answer
    return found


def draw(
    place: str,
    generator: AnyGenerator,
    judge: Judge,
    prompts: Sequence[str],
    seed: int,
    questions: Mapping[str, str],
) -> Drawn:
    """Drawings of prompts, what the judge sees in them, and what the model says of them.

    Args:
        seed: of the first drawing; each further one has the next.
    """
    seeds = range(seed, seed + len(prompts))
    images = torch.stack(list(generator.draw(prompts, seeds)))
    own = _answers(place, images, questions, generator) if questions else []
    return Drawn(list(prompts), images, judge.judge(_floats(images)), own)


def evaluate(
    place: str,
    generator: AnyGenerator,
    real: str,
    test: str | None,
    *,
    caption: str = CAPTION,
    unseen: str = "",
    each: int = EACH,
    seed: int = 0,
    questions: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], Drawn]:
    """Draw every caption of a folder, and judge the drawings.

    Args:
        place: the model.
        generator: the same, as it draws.
        real: a folder of pictures with captions, of which the judge learns.
        test: a second one, which shows how well it judges; None leaves that out.
        caption: a pattern of captions whose named groups are judged.
        unseen: a pattern of the captions that were held out of training.
        each: drawings of a caption.
        seed: of the first drawing.
        questions: asked of the model about its drawings, by the name of what they ask for; None
            asks :data:`QUESTIONS` where the model answers.

    Raises:
        DataError: no pictures, or captions that are not of that form.
    """
    size = generator.model.tokenizer.config.image_size
    images, texts = read_pairs(real, size)
    said = attributes(caption, texts)
    speaks = answers(checkpoint.find(place))
    if questions is None:
        questions = {name: QUESTIONS[name] for name in said[0] if speaks and name in QUESTIONS}
    elif questions and not speaks:
        raise DataError(f"{place} answers no questions: it draws alone")
    if strange := sorted(set(questions) - set(said[0])):
        raise DataError(f"there is a question about {strange[0]}, which {caption!r} does not name")
    try:
        held_out = re.compile(unseen or r"\A(?!)")
    except re.error as error:
        raise DataError(f"{unseen!r} is no regular expression: {error}") from error
    say(f"the judge learns from {len(texts)} pictures of {real}")
    judge = train_judge(images, said)
    report: dict[str, Any] = {"judge": {}}
    remade = None
    if test is not None:
        known, labels = read_pairs(test, size)
        wanted = attributes(caption, labels)
        remade = _reconstructed(generator, known)
        again = _floats(remade)
        report["judge"] = {
            "pictures": len(labels),
            "real": shares(wanted, judge.judge(known)),
            "reconstructed": shares(wanted, judge.judge(again)),
        }
    every = sorted(set(texts))
    prompts = [text for text in every for _ in range(each)]
    drawn = draw(place, generator, judge, prompts, seed, questions)
    wanted = attributes(caption, prompts)
    seen = [held_out.fullmatch(text) is None for text in prompts]
    if unseen and all(seen):
        raise DataError(f"{unseen!r} matches none of the {len(every)} captions of {real}")
    groups = {"captions of training": seen, "captions held out": [not one for one in seen]}
    report["drawings"] = {
        name: _group(drawn, wanted, [i for i, chosen in enumerate(own) if chosen])
        for name, own in groups.items()
        if any(own)
    }
    trained = _reconstructed(generator, images)
    report["diversity"] = diversity(drawn.images, prompts, trained, texts, remade)
    report |= {
        "model": str(checkpoint.find(place)),
        "weights": generator.weights,
        "captions": len(every),
        "each": each,
        "seed": seed,
        "held out": sorted({text for text, one in zip(prompts, seen, strict=True) if not one}),
        "questions": dict(questions),
        "drawn with": generator.facts,
    }
    return report, drawn


def _levels(images: Tensor) -> Tensor:
    """Pictures [N, 3, S, S] uint8 as rows, whose distances are root mean squares of levels."""
    rows = images.flatten(1).float()
    return rows / math.sqrt(rows.shape[1])


def _nearest(images: Tensor, known: Tensor) -> Tensor:
    """The distance [N] of each picture to the nearest known one."""
    return torch.cat([torch.cdist(part, known).amin(1) for part in images.split(256)])


def _spread(images: Tensor, texts: Sequence[str]) -> float:
    """Mean distance of two pictures with one caption, over captions with two or more."""
    means = []
    for text in sorted(set(texts)):
        own = images[[i for i, other in enumerate(texts) if other == text]]
        if len(own) > 1:
            means.append(torch.pdist(own).mean().item())
    return sum(means) / len(means) if means else math.nan


def diversity(
    drawn: Tensor, prompts: Sequence[str], known: Tensor, texts: Sequence[str], test: Tensor | None
) -> dict[str, float]:
    """How far drawings are from what was trained on, and from each other.

    Distances are root mean squares over pixels of 8-bit levels. A model that repeats its training
    pictures has a nearest distance far below that of test pictures; one that draws a class always
    the same has a spread far below that of real ones.

    Args:
        drawn: [N, 3, S, S] uint8 of these prompts.
        known: the training pictures, as the image tokenizer has them, of these captions.
        test: further pictures, as the tokenizer has them.

    Returns:
        Means: "nearest" of drawings to training pictures, "nearest of test pictures" where there
        are any, "spread" of drawings of one prompt, "spread of training pictures" of one caption.
    """
    rows, found = _levels(known), {}
    made = _levels(drawn)
    found["nearest"] = _nearest(made, rows).mean().item()
    if test is not None:
        found["nearest of test pictures"] = _nearest(_levels(test), rows).mean().item()
    values = {"spread": _spread(made, prompts), "spread of training pictures": _spread(rows, texts)}
    return found | {name: value for name, value in values.items() if not math.isnan(value)}


def _group(drawn: Drawn, wanted: Sequence[dict[str, str]], rows: Sequence[int]) -> dict[str, Any]:
    asked = [wanted[i] for i in rows]
    found: dict[str, Any] = {
        "drawings": len(rows),
        "as asked for": shares(asked, [drawn.judged[i] for i in rows]),
    }
    if drawn.answers:
        own = [drawn.answers[i] for i in rows]
        names = list(own[0])
        judged = [{name: drawn.judged[i][name] for name in names} for i in rows]
        asked = [{name: one[name] for name in names} for one in asked]
        found["answers as the judge"] = shares(judged, own)
        found["answers as asked for"] = shares(asked, own)
    return found


def as_table(report: Mapping[str, Any]) -> str:
    """The shares, a line each."""
    names: list[str] = []
    lines: list[tuple[str, dict[str, float]]] = []
    judge = report["judge"]
    if judge:
        count = judge["pictures"]
        lines.append((f"judge: {count} real test pictures", judge["real"]))
        lines.append(("judge: the same as the tokenizer has them", judge["reconstructed"]))
    for name, group in report["drawings"].items():
        lines.append((f"drawings: {group['drawings']} of {name}", group["as asked for"]))
        for key, label in (
            ("answers as the judge", "  its answers are the judge's"),
            ("answers as asked for", "  its answers are what was asked for"),
        ):
            if key in group:
                lines.append((label, group[key]))
    for _, values in lines:
        names += [name for name in values if name not in names]
    names = [name for name in names if name != "all"] + ["all"]
    rows = [("right", *names)]
    for label, values in lines:
        rows.append((label, *(f"{values[n]:.1%}" if n in values else "-" for n in names)))
    found = report["diversity"]
    lines_below = [
        f"{name}: {value:.1f} levels (root mean square)" for name, value in found.items()
    ]
    return "\n".join([*(line.rstrip() for line in table(rows).splitlines()), *lines_below])


def as_sheet(drawn: Drawn, unseen: str = "", columns: int = 8, least: int = 96) -> np.ndarray:
    """The first drawing of each prompt over the prompt and the model's own answers, held-out
    prompts with a mark."""
    held_out = re.compile(unseen or r"\A(?!)")
    first = {text: i for i, text in reversed(list(enumerate(drawn.prompts)))}
    font, cells, line = ImageFont.load_default(), [], 14
    factor = max(1, math.ceil(least / drawn.images.shape[-1]))
    for text, i in sorted(first.items()):
        image = drawn.images[i].permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
        side = image.shape[0]
        width = max(side, 128)
        cell = Image.new("RGB", (width + 8, side + 2 * line + 10), "white")
        cell.paste(Image.fromarray(image), ((width + 8 - side) // 2, 4))
        pen = ImageDraw.Draw(cell)
        mark = " (held out)" if held_out.fullmatch(text) else ""
        pen.text((4, side + 6), f"{text}{mark}", "black", font)
        if drawn.answers:
            own = drawn.answers[i]
            asked = all(drawn.judged[i].get(name) == answer for name, answer in own.items())
            said = ", ".join(own.values())
            pen.text((4, side + 6 + line), f"says: {said}", "#060" if asked else "#a00", font)
        cells.append(np.asarray(cell))
    return tile(cells, columns)


def run(place: str, generator: AnyGenerator, target: Outputs, **options: Any) -> Path:
    """Evaluate, print the table, and write drawings.png and drawings.json.

    Args:
        target: what it writes into, with :data:`FILES` claimed.
        options: of :func:`evaluate`.

    Returns:
        The path of drawings.json.
    """
    report, drawn = evaluate(place, generator, **options)
    print(as_table(report), flush=True)
    with target.together():
        target.write("drawings.png", png(as_sheet(drawn, options.get("unseen", ""))))
        written = target.write_json("drawings.json", report)
    print(f"written into {target.folder}", flush=True)
    return written
