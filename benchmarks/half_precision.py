"""How many tokens change when a tokenizer is rounded to half precision, as the release does.

python -m benchmarks.half_precision --checkpoint RUN --data FOLDER
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tokenflow_ext.errors import TokenFlowError
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.understanding.squares import to_pixels
from tokenflow_ext.models.understanding.vision import TokenFlowVisionConfig, TokenFlowVisionModel
from tokenflow_ext.train.data import list_images, open_image
from tokenflow_ext.train.engine import checkpoint

HALVES = ("bfloat16", "float16")


@torch.no_grad()
def tokens(tokenizer: TokenFlowTokenizer, dtype: str, batches: Sequence[Tensor]) -> Tensor:
    """Tokens [n, L] of images, encoders and codebook rounded to ``dtype``."""
    config = TokenFlowVisionConfig(tokenizer.config, tokenizer_dtype=dtype)
    model = TokenFlowVisionModel(config, copy.deepcopy(tokenizer))
    return torch.cat([model.encode(images) for images in batches])


def shares(
    tokenizer: TokenFlowTokenizer, batches: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Of each half-precision type, which tokens [n, L] are others than in float32."""
    exact = tokens(tokenizer, "float32", batches)
    for dtype in HALVES:
        yield dtype, tokens(tokenizer, dtype, batches) != exact


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.half_precision")
    parser.add_argument("--checkpoint", required=True, metavar="PATH")
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N")
    given = parser.parse_args(argv)
    try:
        tokenizer, _ = checkpoint.load_tokenizer(given.checkpoint)
        side = tokenizer.config.image_size
        pixels = [to_pixels(open_image(path), side, True) for path in list_images(given.data)]
    except TokenFlowError as error:
        sys.exit(f"error: {error}")
    batches = [
        torch.stack([torch.from_numpy(image) for image in pixels[start : start + given.batch_size]])
        for start in range(0, len(pixels), given.batch_size)
    ]
    print(f"{len(pixels)} images; tokens that are others than in float32, all and by scale:")
    for dtype, differs in shares(tokenizer, batches):
        parts = differs.split(tokenizer.quantizer.tokens_per_scale, dim=1)
        scales = " ".join(f"{part.double().mean():.1%}" for part in parts)
        print(f"{dtype:9s} {differs.double().mean():.1%}   {scales}")


if __name__ == "__main__":
    main()
