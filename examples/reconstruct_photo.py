"""Encodes a photograph with released weights, and decodes it from more and more of its tokens.

    python examples/reconstruct_photo.py tokenflow_clipb_32k_enhanced.pt photo.jpg

The weights are an original file of TokenFlow or VAR, a run of ours, or a folder that
`save_pretrained` wrote. Without a photograph it takes one that ships with scikit-image.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from tokenflow_ext.errors import ConfigError, OutputError
from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.train.data import photographs
from tokenflow_ext.train.data.image_files import read_square, to_pixels
from tokenflow_ext.train.engine.checkpoint import load_tokenizer
from tokenflow_ext.train.engine.messages import ending_in_one_line

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("weights")
parser.add_argument("photo", nargs="?", type=Path)
parser.add_argument("--out", type=Path, default=Path("reconstruction.png"))
arguments = parser.parse_args()

with ending_in_one_line(), torch.no_grad():
    if arguments.out.exists():
        raise OutputError(f"{arguments.out} is there already: name another --out")
    tokenizer, _ = load_tokenizer(arguments.weights)
    if not tokenizer.config.pixel.enabled:
        raise ConfigError(f"{arguments.weights} decodes no images: its pixel.enabled is false")
    image = read_square(arguments.photo or photographs()[0], tokenizer.config.image_size)[None]
    tokens = tokenizer.encode(image)
    print(f"{tuple(image.shape)} -> {tuple(tokens.shape)} tokens")
    for upto in range(1, len(tokenizer.quantizer.scales) + 1):
        decoded, _ = tokenizer.decode(tokens, upto)
        used = sum(tokenizer.quantizer.tokens_per_scale[:upto])
        print(f"{used:4d} tokens: {psnr(to_uint8(decoded), to_uint8(image)):.2f} dB")
    Image.fromarray(to_pixels(decoded)[0]).save(arguments.out, "PNG")
    print(f"wrote {arguments.out}")
