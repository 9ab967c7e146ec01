"""Pictures from prompts: single files, a labelled grid, and the folders that benchmarks read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from tokenflow_ext.models.text_to_image import TextToImage
from tokenflow_ext.train import checkpoint
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.language import load_text_tokenizer

#: Filters (top_k, top_p) of each draw of a scale (arXiv 2412.03069, section 4.1).
STEPS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "three": ((1200, 100, 1), (0.8, 0.8, 0.0)),
    "two": ((1200, 1), (0.8, 0.0)),
    "one": ((600,), (0.6,)),
}
LAYOUTS = ("plain", "geneval", "dpg")


@dataclass(frozen=True)
class Prompt:
    """A prompt, the name of what is written for it, and its line in a benchmark's file."""

    text: str
    name: str
    line: dict[str, Any] | None = None


@dataclass
class Painter:
    """A model and how it draws.

    Attributes:
        negative: the text that guidance leads away from; training drops captions to "".
        batch: images drawn at once. An image does not depend on it.
    """

    model: TextToImage
    text_tokenizer: Any
    steps: str = "three"
    guidance: float = 7.5
    negative: str = ""
    batch: int = 16

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", **options: Any) -> Painter:
        """From a run, one of its checkpoints, or a folder with a saved model and text tokenizer.

        Raises:
            CheckpointError: nothing there, or not whole.
        """
        folder = checkpoint.find(path)
        text = load_text_tokenizer(folder)
        return cls(TextToImage.from_pretrained(folder).to(device), text, **options)

    @property
    def runs(self) -> int:
        """Runs of the transformer for one batch: the first scale is drawn once."""
        return 1 + (len(self.model.config.scales) - 1) * len(STEPS[self.steps][0])

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        """Images [3, H, W] uint8, one for each prompt; a bar counts the transformer's runs."""
        top_k, top_p = STEPS[self.steps]
        batches = -(-len(prompts) // self.batch)
        with tqdm(total=batches * self.runs, unit="run", dynamic_ncols=True) as bar:
            # Every run ends in the last norm.
            hook = self.model.model.norm.register_forward_hook(lambda *_: bar.update() and None)
            try:
                for start in range(0, len(prompts), self.batch):
                    yield from self.model.generate(
                        prompts[start : start + self.batch],
                        self.text_tokenizer,
                        negative_prompt=self.negative,
                        guidance=self.guidance,
                        top_k=top_k,
                        top_p=top_p,
                        seed=list(seeds[start : start + self.batch]),
                    ).cpu()
            finally:
                hook.remove()


def plain_prompts(texts: Sequence[str]) -> list[Prompt]:
    """Prompts named by number and first words."""
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
    try:
        if layout == "dpg":
            if not source.is_dir():
                raise DataError(f"layout dpg reads a folder of ITEM.txt, {source} is none")
            files = sorted(source.glob("*.txt"))
            prompts = [Prompt(f.read_text(encoding="utf-8").strip(), f.stem) for f in files]
        else:
            lines = [x for x in source.read_text(encoding="utf-8").splitlines() if x.strip()]
            if layout == "plain" and source.suffix != ".jsonl":
                return plain_prompts([line.strip() for line in lines])
            entries = [json.loads(line) for line in lines]
            if layout == "plain":
                return plain_prompts([entry["prompt"] for entry in entries])
            prompts = [Prompt(e["prompt"], f"{i:05d}", e) for i, e in enumerate(entries)]
    except OSError as error:
        raise DataError(f"cannot read the prompts {source}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{source}: expected {{"prompt": ...}} a line: {error!r}') from error
    if not prompts:
        raise DataError(f"no prompt in {source}")
    return prompts


def write(
    painter: Painter,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    layout: str = "plain",
    each: int = 1,
    seed: int = 0,
    grid: bool = False,
) -> list[Path]:
    """Draw ``each`` pictures a prompt and write them into the folder ``out``.

    plain: NAME.png (NAME_1.png, ... for further ones). geneval: NAME/metadata.jsonl and
    NAME/samples/00000.png, ... dpg: NAME.png, all of a prompt's pictures in rows without gaps.

    Picture m of prompt n has the seed ``seed + n * each + m``. In the benchmarks' layouts prompts
    that are there already are passed over, so that a broken-off run can be continued.

    Returns:
        The pictures' paths; the grid's last.
    """
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    places = [_places(target, prompt.name, layout, each) for prompt in prompts]
    wanted = [
        n
        for n, files in enumerate(places)
        if layout == "plain" or not all(file.exists() for file in files)
    ]
    texts = [prompts[n].text for n in wanted for _ in range(each)]
    seeds = [seed + n * each + m for n in wanted for m in range(each)]
    images = painter.draw(texts, seeds)
    shown: list[np.ndarray] = []
    for n in wanted:
        facts = {"prompt": prompts[n].text, "seed": str(seed + n * each)}
        drawn = [next(images).permute(1, 2, 0).numpy() for _ in range(each)]
        if layout == "dpg":
            drawn = [tile(drawn, math.ceil(each**0.5))]
        for file, image in zip(places[n], drawn, strict=True):
            _save(image, file, facts)
        if layout == "geneval":
            line = json.dumps(prompts[n].line, ensure_ascii=False)
            (target / prompts[n].name / "metadata.jsonl").write_text(line, encoding="utf-8")
        shown += drawn if grid else []
    for _ in images:  # the bar reaches its end
        pass
    written = [file for n in wanted for file in places[n]]
    if grid and shown:
        labels = [prompts[n].text for n in wanted for _ in range(len(places[n]))]
        _save(labelled(shown, labels), target / "grid.png", {})
        written.append(target / "grid.png")
    return written


def _places(target: Path, name: str, layout: str, each: int) -> list[Path]:
    if layout == "geneval":
        return [target / name / "samples" / f"{m:05d}.png" for m in range(each)]
    if layout == "dpg":
        return [target / f"{name}.png"]
    return [target / (f"{name}_{m}.png" if m else f"{name}.png") for m in range(each)]


def _save(image: np.ndarray, path: Path, facts: dict[str, str]) -> None:
    """Written so that a picture is there whole or not at all."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    Image.fromarray(image).save(part, "PNG", pnginfo=info)
    part.replace(path)


def tile(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images [H, W, 3] in rows, without gaps; missing ones at the end are white."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = image
    return sheet


def labelled(images: Sequence[np.ndarray], labels: Sequence[str], least: int = 128) -> np.ndarray:
    """A nearly square grid of images, each over the first lines of its label. Small images are
    enlarged (by repeating pixels) to at least ``least``."""
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
    return tile(cells, math.ceil(len(cells) ** 0.5))
