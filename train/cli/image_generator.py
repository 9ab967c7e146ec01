"""Pictures from prompts: single files, a labelled grid, and the folders that benchmarks read."""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.train.data.image_files import tile
from tokenflow_ext.train.data.outputs import Outputs, json_text, png
from tokenflow_ext.train.data.text_files import (
    DataError,
    check_file,
    check_text,
    json_lines,
    lines,
    read_text,
    reason,
    say,
)
from tokenflow_ext.train.tasks.image_generator import ImageGenerator

LAYOUTS = ("plain", "geneval", "dpg")


@dataclass(frozen=True)
class Prompt:
    """A prompt, the name of what is written for it, and its line in a benchmark's file."""

    text: str
    name: str
    line: dict[str, Any] | None = None


def plain_prompts(texts: Sequence[str]) -> list[Prompt]:
    """Prompts named by number and first words.

    Raises:
        DataError: one is no text.
    """
    for number, text in enumerate(texts, start=1):
        check_text(text, f"prompt {number}")
    words = [re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] for text in texts]
    return [
        Prompt(text, f"{i:05d}_{word}".rstrip("_"))
        for i, (text, word) in enumerate(zip(texts, words, strict=True))
    ]


def read_prompts(path: str | Path, layout: str) -> list[Prompt]:
    """The prompts of a benchmark.

    plain: a text file with one a line, or JSON lines with "prompt". geneval: GenEval's
    ``evaluation_metadata.jsonl``. dpg: DPG-Bench's folder of prompts, ITEM.txt each.

    Raises:
        DataError: a file that is missing or not of that form.
    """
    source = Path(path)
    if layout == "dpg":
        if not source.is_dir():
            raise DataError(f"layout dpg reads a folder of ITEM.txt, {source} is none")
        prompts = [_read_item(file) for file in sorted(source.glob("*.txt"))]
    else:
        try:
            check_file(source)
        except OSError as error:
            raise DataError(f"cannot read the prompts {source}: {reason(error)}") from error
        if layout == "plain" and source.suffix != ".jsonl":
            prompts = plain_prompts([line for _, line in lines(read_text(source))])
        else:
            entries = []
            for number, entry in json_lines(source, '{"prompt": text}'):
                where = f"{source}, line {number}"
                if "prompt" not in entry:
                    raise DataError(f'{where}: no "prompt", but {", ".join(entry) or "nothing"}')
                if not check_text(entry["prompt"], where).strip():
                    raise DataError(f"{where}: the prompt is empty")
                entries.append(entry)
            prompts = plain_prompts([entry["prompt"] for entry in entries])
            if layout == "geneval":
                prompts = [Prompt(e["prompt"], f"{i:05d}", e) for i, e in enumerate(entries)]
    if not prompts:
        raise DataError(f"no prompt in {source}")
    return prompts


def _read_item(file: Path) -> Prompt:
    text = read_text(file).strip()
    if not text:
        raise DataError(f"{file}: the prompt is empty")
    return Prompt(check_text(text, str(file)), file.stem)


@dataclass(frozen=True)
class Picture:
    """A file that is to be drawn: its name in the folder, the number of its prompt, the prompt and
    seeds (several for one that shows several images), and what is written into it."""

    name: str
    number: int
    text: str
    seeds: tuple[int, ...]
    facts: dict[str, str]

    def is_there(self, folder: Path) -> bool:
        """Whether the file is there, drawn from the same; :attr:`facts` that it says."""
        path = folder / self.name
        try:
            check_file(path)
            with Image.open(path) as image:
                said = image.info
        except (OSError, ValueError, SyntaxError):
            return False
        return all(said.get(key) == value for key, value in self.facts.items())


def pictures(
    prompts: Sequence[Prompt], layout: str, each: int, seed: int, drawn: dict[str, str]
) -> list[Picture]:
    """The files of prompts, ``each`` images a prompt.

    Image m of prompt n has the seed ``seed + n * each + m``.

    Args:
        drawn: :attr:`ImageGenerator.facts`.
    """
    made = []
    for n, prompt in enumerate(prompts):
        seeds = range(operator.index(seed) + n * each, operator.index(seed) + (n + 1) * each)
        if layout == "dpg":
            files = [(f"{prompt.name}.png", tuple(seeds))]
        else:
            names = _names(prompt.name, layout, each)
            files = [(name, (one,)) for name, one in zip(names, seeds, strict=True)]
        for name, some in files:
            about = {"prompt": prompt.text, "seed": str(some[0])} | drawn
            if len(some) > 1:
                about["images"] = str(len(some))
            made.append(Picture(name, n, prompt.text, some, about))
    return made


def claim(
    target: Outputs, prompts: Sequence[Prompt], wanted: Sequence[Picture], layout: str, grid: bool
) -> list[Picture]:
    """The pictures that are still to be drawn; the others are there, drawn from the same.

    Raises:
        OutputError: something else is there.
    """
    missing = [p for p in wanted if target.overwrite or not p.is_there(target.folder)]
    names = [picture.name for picture in missing]
    if layout == "geneval":
        names += [name for name, line in _lines(prompts) if not _holds(target.folder / name, line)]
    if grid and (target.overwrite or not grid_of(wanted).is_there(target.folder)):
        names.append("grid.png")
    target.claim(names)
    return missing


def write(
    generator: ImageGenerator,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    layout: str = "plain",
    each: int = 1,
    seed: int = 0,
    grid: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Draw ``each`` pictures a prompt and write them into the folder ``out``.

    plain: NAME.png (NAME_1.png, ... for further ones). geneval: NAME/metadata.jsonl and
    NAME/samples/00000.png, ... dpg: NAME.png, all of a prompt's pictures in rows without gaps.

    Picture m of prompt n has the seed ``seed + n * each + m``. Pictures that are there already,
    drawn from the same prompt and seed in the same way by the same model, are passed over, so that
    a broken-off run can be continued.

    Returns:
        The paths of the pictures that were drawn; the grid's last.

    Raises:
        OutputError: something else is there, and ``overwrite`` is false.
    """
    target = Outputs(Path(out), overwrite)
    wanted = pictures(prompts, layout, each, seed, generator.facts)
    missing = claim(target, prompts, wanted, layout, grid)
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} pictures are in {out} already, drawn from the same")
    if layout == "geneval":
        for name, line in _lines(prompts):
            if not _holds(target.folder / name, line):
                target.write(name, line)
    # Of a prompt all are drawn: in a batch of other company an image may differ in its last bits.
    numbers = {picture.number for picture in missing}
    redrawn = [picture for picture in wanted if picture.number in numbers]
    texts = [picture.text for picture in redrawn for _ in picture.seeds]
    seeds = [seed for picture in redrawn for seed in picture.seeds]
    written, names = [], {picture.name for picture in missing}
    with closing(generator.draw(texts, seeds)) as images:
        for picture in redrawn:
            drawn = [next(images).permute(1, 2, 0).numpy() for _ in picture.seeds]
            image = drawn[0] if layout != "dpg" else tile(drawn, math.ceil(each**0.5))
            if picture.name in names:
                written.append(target.write(picture.name, png(image, picture.facts)))
        for _ in images:  # the bar reaches its end
            pass
    sheet = grid_of(wanted)
    if grid and (overwrite or not sheet.is_there(target.folder)):
        shown = []
        for picture in wanted:
            with Image.open(target.folder / picture.name) as file:
                shown.append(np.asarray(file))
        made = labelled(shown, [picture.text for picture in wanted])
        written.append(target.write(sheet.name, png(made, sheet.facts)))
    return written


def grid_of(pictures: Sequence[Picture]) -> Picture:
    """The sheet of all pictures."""
    every = json_text([picture.facts for picture in pictures])
    return Picture("grid.png", 0, "", (), {"pictures": hashlib.sha256(every).hexdigest()})


def _names(name: str, layout: str, each: int) -> list[str]:
    if layout == "geneval":
        return [f"{name}/samples/{m:05d}.png" for m in range(each)]
    return [f"{name}_{m}.png" if m else f"{name}.png" for m in range(each)]


def _lines(prompts: Sequence[Prompt]) -> list[tuple[str, bytes]]:
    """Name and content of GenEval's file beside each prompt's pictures."""
    return [(f"{prompt.name}/metadata.jsonl", json_text(prompt.line)) for prompt in prompts]


def _holds(path: Path, content: bytes) -> bool:
    try:
        check_file(path)
        return path.read_bytes() == content
    except OSError:
        return False


def labelled(
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    least: int = 128,
    columns: int | None = None,
) -> np.ndarray:
    """A grid of images, nearly square without ``columns``, each over the first lines of its label.
    Small images are enlarged (by repeating pixels) to at least ``least``."""
    factor = max(1, -(-least // max(images[0].shape[:2])))
    height, width = (side * factor for side in images[0].shape[:2])
    font, lines, line = ImageFont.load_default(), 2, 12
    cells = []
    for image, label in zip(images, labels, strict=True):
        cell = Image.new("RGB", (width + 4, height + lines * line + 6), "white")
        cell.paste(Image.fromarray(image.repeat(factor, 0).repeat(factor, 1)), (2, 2))
        pen, rest = ImageDraw.Draw(cell), label.split()
        for row in range(lines):
            text = ""
            while rest and pen.textlength(f"{text} {rest[0]}".strip(), font) <= width:
                text = f"{text} {rest.pop(0)}".strip()
            if rest and not text:  # a word wider than the picture
                text = rest.pop(0)
            pen.text((2, height + 3 + row * line), text, "black", font)
        cells.append(np.asarray(cell))
    return tile(cells, columns or math.ceil(len(cells) ** 0.5))


_GENERATOR = "tokenflow_ext.train.tasks.image_generator"
__getattr__ = renamed(
    __name__,
    {
        "Painter": f"{_GENERATOR}:ImageGenerator",
        "facts": f"{_GENERATOR}:facts",
        "STEPS": "tokenflow_ext.sampler:PRESETS",
    },
)
