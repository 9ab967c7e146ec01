"""Quantizes feature maps, trains the codebook on them, and reads the maps back from their tokens.

    python examples/quantize_features.py [--steps 200]

The features are smooth random fields. The printed error falls as the codebook learns them, and with
every scale that is added to the reconstruction.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from tokenflow_ext import MultiScaleQuantizer

SEMANTIC, PIXEL, GRID = 32, 8, 8


def smooth_fields(count: int, mixing: torch.Tensor) -> torch.Tensor:
    """Features [count, 40, 8, 8] with two traits of an encoder's: they vary slowly over the grid
    and their channels are mixtures of a few causes."""
    causes = F.interpolate(torch.randn(count, len(mixing), 3, 3), (GRID, GRID), mode="bicubic")
    return torch.einsum("bchw,cd->bdhw", causes, mixing)


def relative_error(decoded: torch.Tensor, features: torch.Tensor) -> float:
    """Mean squared error as a share of the features' mean square."""
    return ((decoded - features).square().mean() / features.square().mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(
        codebook_size=1024, dims=(SEMANTIC, PIXEL), scales=(1, 2, 4, 8), l2_norm=False
    )
    mixing = torch.randn(4, SEMANTIC + PIXEL)
    held_out = smooth_fields(64, mixing)

    optimizer = torch.optim.Adam(quantizer.parameters(), lr=2e-2)
    for step in range(steps):
        out = quantizer(smooth_fields(16, mixing))
        optimizer.zero_grad()
        out.vq_loss.backward()  # moves the codes towards the features that chose them
        optimizer.step()
        if step % 40 == 0 or step == steps - 1:
            share = out.usage.share.item()
            print(f"step {step:4d}: vq loss {out.vq_loss.item():.3f}, codes in use {share:.0%}")

    quantizer.eval()
    tokens = quantizer.encode(held_out)
    print(f"{tuple(held_out.shape)} -> {tuple(tokens.shape)} tokens")
    for scales in range(1, len(quantizer.scales) + 1):
        decoded = quantizer.decode(tokens, upto=scales, size=(GRID, GRID))
        used = sum(quantizer.tokens_per_scale[:scales])
        print(f"first {used:3d} tokens: relative error {relative_error(decoded, held_out):.3f}")


if __name__ == "__main__":
    main()
