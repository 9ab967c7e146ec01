"""Encodes a photograph with released weights, and decodes it from more and more of its tokens.

    python examples/reconstruct_photo.py tokenflow_clipb_32k_enhanced.pt photo.jpg back.png

The weights are an original file of TokenFlow or VAR, a run of ours, or a folder that
`save_pretrained` wrote.
"""

import sys

import torch
from PIL import Image

from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.train.data.image_files import read_square, to_pixels
from tokenflow_ext.train.engine.checkpoint import load_tokenizer
from tokenflow_ext.train.engine.messages import ending_in_one_line

if len(sys.argv) != 4:
    sys.exit(__doc__)
with ending_in_one_line(), torch.no_grad():
    weights, photo, out = sys.argv[1:]
    tokenizer, _ = load_tokenizer(weights)
    image = read_square(photo, tokenizer.config.image_size)[None]
    tokens = tokenizer.encode(image)
    for upto in range(1, len(tokenizer.quantizer.scales) + 1):
        decoded = tokenizer.decode_pixels(tokenizer.quantizer.decode(tokens, upto))
        used = sum(tokenizer.quantizer.tokens_per_scale[:upto])
        print(f"{used:4d} tokens: {psnr(to_uint8(decoded), to_uint8(image)):.2f} dB")
    with open(out, "xb") as file:  # writes over nothing
        Image.fromarray(to_pixels(decoded)[0]).save(file, "PNG")
