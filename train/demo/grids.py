"""A picture's tokens as coloured squares, what is drawn from them, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from html import escape

from torch import Tensor

from .codes import Codes, hexes
from .html import framed, of_tensor
from .layout import Layout
from .pictures import TokenPicture

#: Said where groups stand side by side.
_TOGETHER = (
    "The groups of a place have no order: a picture needs all of them, so that there is none after "
    "a group alone."
)

_UNSEEN = (
    "This token is of the semantic branch. The picture is drawn from the pixel branch alone, so "
    "that no other code here changes it."
)


def _decibels(value: float) -> str:
    return "no difference" if math.isinf(value) else f"{value:.1f} dB"


def token_grid(
    codes: Codes,
    scale: tuple[int, int],
    tokens: Sequence[int],
    numbers: Sequence[int],
    chosen: int | None = None,
    swapped: Collection[int] = (),
) -> str:
    """A scale's tokens of a group at a round as coloured squares, which can be clicked.

    Args:
        tokens: of the scale, row by row.
        numbers: of each in the picture.
        chosen: the number of the token that is looked at.
        swapped: the numbers of tokens that are not the picture's own.
    """
    cells = []
    colours = hexes(codes, tokens)
    for at, (code, number, colour) in enumerate(zip(tokens, numbers, colours, strict=True)):
        marks = "tf-token" + " tf-chosen" * (number == chosen) + " tf-swapped" * (number in swapped)
        where = f"row {at // scale[1] + 1}, column {at % scale[1] + 1}"
        said = f"code {code}, {where}" + ", swapped" * (number in swapped)
        cells.append(
            f'<button class="{marks}" data-number="{number}" title="{said}" '
            f'style="background:{colour}"></button>'
        )
    columns = f"grid-template-columns: repeat({scale[1]}, 1fr)"
    return f'<div class="tf-grid" style="{columns}">{"".join(cells)}</div>'


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _grids(
    codes: Sequence[Codes],
    layout: Layout,
    tokens: Tensor,
    step: int,
    chosen: int | None,
    swapped: Collection[int],
) -> str:
    """The grids of all groups at a step."""
    grids = []
    for group, one in enumerate(codes):
        numbers = layout.numbers(step, group)
        own = tokens[numbers.start : numbers.stop : numbers.step].tolist()
        scale = layout.scales[layout.steps[step][0]]
        grid = token_grid(one, scale, own, numbers, chosen, swapped)
        grids.append(grid if len(codes) == 1 else f"<div><small>{one.name}</small>{grid}</div>")
    return grids[0] if len(grids) == 1 else f'<div class="tf-groups">{"".join(grids)}</div>'


def steps(
    codes: Sequence[Codes],
    layout: Layout,
    tokens: Tensor,
    images: Tensor,
    psnr: Sequence[float] | None = None,
    chosen: int | None = None,
    swapped: Sequence[int] = (),
) -> str:
    """A card for each step: its tokens, and the picture decoded from all tokens so far.

    Args:
        codes: of each index.
        tokens: [N] of the first steps.
        images: [S, 3, H, W] uint8, after each of them.
        psnr: of the images, where there is an original.
    """
    cards, so_far, marked = [], 0, frozenset(swapped)
    for step, image in enumerate(images):
        count = len(layout.numbers(step, 0)) * layout.groups
        so_far += count
        grids = _grids(codes, layout, tokens, step, chosen, marked)
        title = f"<h4>{layout.name(step)} <small>{_counted(count, 'token')}</small></h4>"
        shown = of_tensor(image, f"the picture from the first {so_far} tokens")
        measured = ""
        if psnr is not None:
            share = min(1.0, max(0.0, psnr[step] / 40))
            measured = (
                f"<p>{_decibels(psnr[step])}</p>"
                f'<div class="tf-bar"><i style="width:{share:.0%}"></i></div>'
            )
        cards.append(f'<div class="tf-step">{title}{grids}{shown}{measured}</div>')
    many = len(codes) > 1
    order = "coarse to fine" if len(layout.scales) > 1 else "round by round"
    order = order if len(layout.steps) > 1 else "all at once"
    return framed(
        f"<h5>The tokens, {order}, and what is drawn from all tokens so far</h5>",
        f'<div class="tf-steps{" tf-many" * many}">{"".join(cards)}</div>',
        f'<p class="tf-note">{_TOGETHER}</p>' * many,
    )


def _sizes(codes: Sequence[Codes]) -> str:
    least, most = min(map(len, codes)), max(map(len, codes))
    return f"{most:,} codes" if least == most else f"{least:,} to {most:,} codes"


def _arrangement(layout: Layout) -> str:
    """How tokens come to be so many, where a place has several."""
    if layout.groups * layout.depth == 1:
        return ""
    factors = [_counted(layout.places, "place")]
    factors += [_counted(layout.groups, "group")] * (layout.groups > 1)
    factors += [_counted(layout.depth, "round")] * (layout.depth > 1)
    return " × ".join(factors) + ", "


def comparison(picture: TokenPicture, codes: Sequence[Codes], layout: Layout) -> str:
    """Original and reconstruction side by side, with what they cost."""
    height, width = picture.original.shape[-2:]
    count, size, plain = layout.count, math.ceil(layout.bits / 8), 3 * height * width
    swapped = picture.swapped

    def figure(image: Tensor, caption: str) -> str:
        return f"<figure>{of_tensor(image, caption)}<figcaption>{caption}</figcaption></figure>"

    shown = [
        figure(picture.original, f"the picture, {width} × {height} pixels"),
        figure(picture.before, f"drawn again from its {count} tokens"),
    ]
    if swapped:
        noun = "token" if len(swapped) == 1 else "tokens"
        shown.append(figure(picture.steps[-1], f"with {len(swapped)} {noun} swapped"))
    facts = (
        f'<div class="tf-facts"><div><b>{count} tokens</b>{_arrangement(layout)}each one of '
        f"{escape(_sizes(codes))}</div>"
        f"<div><b>{size:,} bytes</b>the pixels themselves are {plain:,}, "
        f"{plain / max(1, size):.0f} times as many</div>"
        f"<div><b>{_decibels(picture.psnr[-1])}</b>how near the last picture is to the first "
        "(PSNR: more is nearer, and the eye hardly sees a difference from about 40 on)</div></div>"
    )
    return framed(f'<div class="tf-pair">{"".join(shown)}{facts}</div>')


def effect(picture: TokenPicture, unseen: bool = False) -> str:
    """What swapped tokens change, beside the field that swaps them; nothing where none is.

    Args:
        unseen: whether the token that is looked at is of no branch that draws.
    """
    note = f'<p class="tf-note">{_UNSEEN}</p>' * unseen
    if not picture.swapped:
        asked = "Put another code in, and see here what it changes."
        return framed(note or f'<p class="tf-note">{asked}</p>')
    before, after = picture.before, picture.steps[-1]
    change = (after.int() - before.int()).abs().amax(dim=0)
    scaled = (change * 255 // change.max().clamp_min(1)).to(before.dtype).expand_as(before)
    shown = (
        (before, "before"),
        (after, "after"),
        (scaled, f"where it changed, most by {int(change.max())} of 255"),
    )
    figures = "".join(
        f"<figure>{of_tensor(image, caption)}<figcaption>{caption}</figcaption></figure>"
        for image, caption in shown
    )
    return framed(note, f'<div class="tf-pair tf-small">{figures}</div>')
