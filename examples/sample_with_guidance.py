"""Draws tokens with classifier-free guidance, and shows what guidance and the filters do.

    python examples/sample_with_guidance.py

A toy model of 4,096 codes prefers the first 64 a little. Guidance turns that preference up. A seed
gives the same tokens however the batch is split.
"""

from __future__ import annotations

import torch

from tokenflow_ext import MultiStepSampler, sample_top_k_top_p

CODES, WANTED, ROWS = 4096, 64, 2000


def main() -> None:
    torch.manual_seed(0)
    unconditional = torch.randn(CODES).expand(ROWS, CODES)
    conditional = unconditional.clone()
    conditional[:, :WANTED] += 1.5

    for guidance in (0.0, 1.0, 2.0, 4.0):
        tokens = sample_top_k_top_p(
            conditional, uncond=unconditional, guidance=guidance, top_k=1200, top_p=0.8, seed=0
        )
        share = (tokens < WANTED).float().mean().item()
        print(f"guidance {guidance:.0f}: {share:.1%} of the tokens are among the wanted codes")

    whole = sample_top_k_top_p(conditional, top_p=0.8, seed=1)
    halves = [
        sample_top_k_top_p(rows, top_p=0.8, seed=1, offset=start)
        for start, rows in zip((0, ROWS // 2), conditional.split(ROWS // 2), strict=True)
    ]
    print(f"the same tokens from two half batches: {torch.equal(whole, torch.cat(halves))}")

    # A next-scale model: each scale but the first is drawn three times, and the model is given the
    # tokens of the last draw. This toy does not look at them.
    scales = (1, 2, 4)
    sampler = MultiStepSampler.preset("three", scales=scales, guidance=4.0)

    def model(scale: int, drawn: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        positions = scales[scale] ** 2
        return conditional[None, :positions], unconditional[None, :positions]

    for side, tokens in zip(scales, sampler.sample(model, seed=0), strict=True):
        print(
            f"scale {side} x {side}: {tokens.shape[1]} tokens, the first is {tokens[0, 0].item()}"
        )


if __name__ == "__main__":
    main()
