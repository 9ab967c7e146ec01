"""Published quantizers by name, as arguments of `tokenflow_ext.Quantizer`.

Each function's docstring cites its source and says what is and what is not the same. A preset is
the quantizer alone: projections, attention and encoders around it belong to the models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .codes import Entropy, Levels, Projected, Signs, Table

#: The pyramids of the published models.
TOKENFLOW_B = (1, 2, 4, 6, 8, 10, 12, 14)
TOKENFLOW_L = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16)
TOKENFLOW_XL = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
INFINITY_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
IMAGEFOLDER = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)


def _tokenflow(scales: tuple[int, ...]) -> dict[str, Any]:
    return {
        "groups": (Table(32_768, 32, l2_norm=True), Table(32_768, 8, l2_norm=True)),
        "scales": scales,
        "scale_drop": 0.1,
    }


def tokenflow_b() -> dict[str, Any]:
    """TokenFlow-B (arXiv 2412.03069, table 1): a semantic and a pixel table that share one index,
    l2-normalised, over the scales of 224 px (16 more at 256 px).

    The same: codes, distance, losses. `MultiScaleQuantizer` is this without the wrapper.
    """
    return _tokenflow(TOKENFLOW_B)


def tokenflow_l() -> dict[str, Any]:
    """TokenFlow-L, as `tokenflow_b` on its scales."""
    return _tokenflow(TOKENFLOW_L)


def tokenflow_xl() -> dict[str, Any]:
    """TokenFlow-XL, as `tokenflow_b` on its scales."""
    return _tokenflow(TOKENFLOW_XL)


def var() -> dict[str, Any]:
    """VAR's tokenizer (arXiv 2404.02905): 4,096 codes of 32, ten scales, four shared convolutions.

    The same: search, convolutions, losses of the running sum, which are one number in the original
    and two here.
    """
    return {
        "groups": Table(4_096, 32),
        "scales": VAR_256,
        "errors": "running",
        "phi": (0.5, 4),
        "straight_through": "identity",
    }


def unitok() -> dict[str, Any]:
    """UniTok (arXiv 2502.20321): eight codebooks of 4,096 x 8, each with an index of its own,
    l2-normalised, by inner product.

    The same: indices, losses (of the normalised features, averaged over codebooks), the gradient
    through the normalisation. Not: indices are [B, L, 8], the original's [B, 8, L]; usage is
    counted by hits, where the original counts codes hit in more than 1% of the even share.
    """
    return {
        "groups": (Table(4_096, 8, l2_norm=True),) * 8,
        "index": "own",
        "metric": "dot",
    }


def _dualtoken(depth: int, side: int) -> dict[str, Any]:
    return {
        "groups": (Table(16_384, 32),) * 2,
        "index": "own",
        "depth": depth,
        "scales": (side,),
        "update": "ema",
        "errors": "running",
        "straight_through": "identity",
        "beta": 1.0,
    }


def dualtoken_256() -> dict[str, Any]:
    """DualToken at 256 px (arXiv 2503.14324): a semantic and a pixel branch, each with 16,384 codes
    of 32 and four rounds of residual quantization at one scale.

    The same: search, the commitment of the cumulated depth, running means. Not: a code's mean is
    smoothed by the original (Laplace) and moves from the first step on, here from the first hit;
    each depth's rows are what it searched with, where the original's released code adds up what all
    depths have left, in each, by a view that it changes; dead codes are restarted where
    `restart_dead_codes` is called. The commitment is the mean over the branches. Features are the
    two branches' channels side by side.
    """
    return _dualtoken(4, 16)


def dualtoken_384() -> dict[str, Any]:
    """DualToken at 384 px: as `dualtoken_256`, with eight rounds at 27 x 27 places."""
    return _dualtoken(8, 27)


def vila_u() -> dict[str, Any]:
    """VILA-U's residual quantizer (arXiv 2409.04429) for 256 px: four rounds of 16,384 codes.

    The same and not the same: as `dualtoken_256`, with one branch. The codes' width is that of its
    features, 1,024 here.
    """
    return _dualtoken(4, 16) | {"groups": Table(16_384, 1_024), "index": "shared"}


def llamagen() -> dict[str, Any]:
    """LlamaGen (arXiv 2406.06525): 16,384 codes of 8, l2-normalised.

    The same: search, losses, the gradient through the normalisation. Its optional entropy loss is
    `entropy=Entropy(ratio)`.
    """
    return {"groups": Table(16_384, 8, l2_norm=True)}


def simvq() -> dict[str, Any]:
    """SimVQ (arXiv 2411.02038): 65,536 frozen codes of 128 behind a learned layer.

    The same: codes, losses with legacy=False, straight-through. Not: `indices_to_codes` gives
    projected codes, the original's lookup forgets the layer.
    """
    return {"groups": Projected(65_536, 128)}


def ta_tok() -> dict[str, Any]:
    """TA-Tok (arXiv 2506.18898): SimVQ with 65,536 l2-normalised codes, on grids pooled to 27, 13
    or 9 places a side.

    The same: codes and search. Take `scales=(13,)` or `(9,)` for fewer tokens. The codes' width is
    that of its features, 1,152 here.
    """
    return {"groups": Projected(65_536, 1_152, l2_norm=True), "scales": (27,)}


def ibq() -> dict[str, Any]:
    """IBQ (arXiv 2412.02692): 262,144 codes of 256 by inner product, with a gradient to all of
    them.

    The same: the choice, losses and gradients, the entropy's weight 0.05 and temperature 0.01.
    """
    return {
        "groups": Table(262_144, 256),
        "metric": "dot",
        "straight_through": "softmax",
        "entropy": Entropy(0.05, temperature=0.01),
    }


def lfq() -> dict[str, Any]:
    """LFQ as Open-MAGVIT2 trains it (arXiv 2409.04410): 18 signs, little-endian indices.

    The same: codes, the entropies over all 2^18 codes (without listing them for every row), the
    commitment.
    """
    return {"groups": Signs(18), "entropy": Entropy(0.1, temperature=0.01)}


def wetok() -> dict[str, Any]:
    """WeTok (arXiv 2508.05599): eight groups of eight signs, each with an index of its own.

    The same: codes, and one entropy of the choices of all groups. Not: its decoder is not a
    quantizer's matter.
    """
    return {
        "groups": (Signs(8),) * 8,
        "index": "own",
        "entropy": Entropy(0.1, temperature=0.01),
    }


def infinity_32() -> dict[str, Any]:
    """Infinity's tokenizer (arXiv 2412.04431): 32 signs at unit length over 13 scales of a square
    image of a million pixels, averaged down and linear up, big-endian bits.

    The same: bits, and what the scales leave. The released code has losses of zero; the entropy of
    BSQ, a sum over bits, is `entropy=Entropy(weight, factorized=True)`. Random flips are
    `flips=0.3`, for instance: the original draws the share.
    """
    return {
        "groups": Signs(32, spherical=True, little_endian=False),
        "scales": INFINITY_1M,
        "upsampling": "bilinear",
        "beta": 0.0,
    }


def imagefolder() -> dict[str, Any]:
    """ImageFolder (arXiv 2410.01756): a semantic and a detail branch, each with 4,096 codes of 32
    found by cosine over VAR's pyramid.

    The same: search, convolutions, codes that are added as they are stored. Not: its random drop of
    finer scales for a share of images (`scale_drop` leaves out one scale for all), and its codebook
    loss is divided by the number of scales once more.
    """
    return {
        "groups": (Table(4_096, 32, l2_norm=True),) * 2,
        "index": "own",
        "scales": IMAGEFOLDER,
        "errors": "running",
        "phi": (0.5, 4),
        "straight_through": "identity",
    }


def fsq() -> dict[str, Any]:
    """FSQ (arXiv 2309.15505) at about 2^16 codes: levels 8, 8, 8, 5, 5, 5 as its table 1 has them.

    The same: bounds, rounding, values, indices. There is no loss.
    """
    return {"groups": Levels((8, 8, 8, 5, 5, 5)), "beta": 0.0}


#: Presets by name.
PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        tokenflow_b,
        tokenflow_l,
        tokenflow_xl,
        var,
        unitok,
        dualtoken_256,
        dualtoken_384,
        vila_u,
        llamagen,
        simvq,
        ta_tok,
        ibq,
        lfq,
        wetok,
        infinity_32,
        imagefolder,
        fsq,
    )
}


def preset(name: str) -> dict[str, Any]:
    """Arguments of `Quantizer` by a preset's name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()
