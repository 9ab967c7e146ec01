"""The call chains of docs/architecture.md, as they are: small runs, and the stack at their ends.

python tests/call_chains.py           # writes them into the page
python tests/call_chains.py FILE      # writes them into FILE
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from tokenflow_ext import MultiScaleQuantizer
from tokenflow_ext.models import TokenFlowTokenizer, TokenizerConfig
from tokenflow_ext.train import text_to_image, tokenizer
from tokenflow_ext.train.cli import entry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- written by tests/call_chains.py -->\n", "<!-- until here -->\n"
FOLDERS = ("tokenflow_ext", "models", "train")


@dataclasses.dataclass(frozen=True)
class End:
    """Where a chain ends: the first call of ``function``, in a file whose path ends in ``file``."""

    title: str
    function: str
    file: str
    operator: str = ""  # of a call of torch.ops, its name

    def reached(self, frame: FrameType) -> bool:
        code = frame.f_code
        if code.co_name != self.function or not code.co_filename.endswith(self.file):
            return False
        return self.operator in str(frame.f_locals.get("self", ""))


def name(frame: FrameType) -> str | None:
    """The function's name from the repository's root, None for one of others."""
    path = Path(os.path.realpath(frame.f_code.co_filename))
    if not any(path.is_relative_to(ROOT / folder) for folder in FOLDERS):
        return None
    function = frame.f_code.co_qualname.replace(".<locals>", "")
    if "<" in function:  # a comprehension, a lambda, a module's own code
        return None
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"{module}.{function}"


def stack(frame: FrameType | None) -> list[str]:
    """The package's functions that are being run, outermost first."""
    names: list[str] = []
    while frame is not None:
        if said := name(frame):
            names.append(said)
        frame = frame.f_back
    return names[::-1]


def chains(ends: list[End], run: Callable[[], Any]) -> dict[str, list[str]]:
    """The stack of ``run`` at each end, by its title."""
    found: dict[str, list[str]] = {}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            for end in ends:
                if end.title not in found and end.reached(frame):
                    found[end.title] = stack(frame)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {end.title: found[end.title] for end in ends}


def load_micro() -> ModuleType:
    """tests/train/micro.py, by its path: a package "train" would hide the sources' own."""
    spec = importlib.util.spec_from_file_location("micro", ROOT / "tests/train/micro.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_original(file: Path) -> TokenizerConfig:
    """An original checkpoint with small networks, and its configuration."""
    preset = TokenizerConfig.preset("B")
    sizes = {"width": 24, "depth": 2, "heads": 2, "mlp_width": 40}
    tower = dataclasses.replace(preset.semantic.tower, **sizes)
    config = dataclasses.replace(
        preset,
        semantic=dataclasses.replace(
            preset.semantic, tower=tower, decoder_width=24, decoder_depth=1
        ),
        pixel=dataclasses.replace(preset.pixel, channels=16, groups=4),
        quantizer=dataclasses.replace(preset.quantizer, codebook_size=64),
        teacher=dataclasses.replace(tower, projection=20),
    )
    TokenFlowTokenizer(config).save_original(file)
    return config


def journeys(scratch: Path) -> dict[str, list[str]]:
    """Every chain of the page, by its title."""
    micro = load_micro()
    quantizer, h = MultiScaleQuantizer(64, (4, 4), (1, 2, 4)).eval(), torch.randn(2, 8, 4, 4)
    indices = quantizer.encode(h)
    operator = "torch/_ops.py"
    found = chains(
        [End("features to indices", "__call__", operator, "multiscale_quantize")],
        lambda: quantizer.encode(h),
    )
    found |= chains(
        [End("indices to features", "__call__", operator, "multiscale_decode")],
        lambda: quantizer.decode(indices),
    )
    images, run = micro.draw_images(scratch / "images"), scratch / "run"
    found |= chains(
        [
            End("picture to loss", "tokenizer_loss", "models/losses/tokenizer.py"),
            End("loss to checkpoint", "save_file", "safetensors/torch.py"),
        ],
        lambda: tokenizer.main(micro.overrides(run, images, *micro.PIXEL_ONLY, "optim.steps=3")),
    )
    text, out = scratch / "text", scratch / "out"
    text_to_image.main(micro.text_overrides(text, run, micro.draw_pairs(scratch / "pairs")))
    sys.argv = ["tokenflow", "generate", "a disc", "--checkpoint", str(text), "--out", str(out)]
    found |= chains(
        [
            End("prompt to tokens", "__call__", operator, "sample_top_k_top_p"),
            End("tokens to PNG", "save", "PIL/Image.py"),
        ],
        entry.main,
    )
    file = scratch / "original.pt"
    config = small_original(file)
    return found | chains(
        [
            End("original file to tensors", "load", "torch/serialization.py"),
            End("tensors to model", nn.Module.load_state_dict.__name__, "nn/modules/module.py"),
        ],
        lambda: TokenFlowTokenizer.from_pretrained(file, config=config),
    )


def written(found: dict[str, list[str]]) -> str:
    """The chains as the page has them."""
    parts = []
    for title, names in found.items():
        lines = "\n".join(names)
        head = f"{title[0].upper()}{title[1:]}, {len(names)} function{'s' * (len(names) != 1)}:"
        parts.append(f"{head}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def on_the_page() -> str:
    """What the page says now."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    with tempfile.TemporaryDirectory() as folder:
        content = written(journeys(Path(folder)))
    if target != PAGE:
        target.write_text(content)
        return
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{begin}\n{content}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
