"""The page's own pieces of HTML. What comes from people or files is escaped here."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from torch import Tensor

from tokenflow_ext.train.data.outputs import png

from .codes import Codes
from .patches import PatchIndex
from .pictures import Place, TokenPicture

LEFT_OVER = (
    " From the second scale on a token stands for what earlier tokens have left out, so that "
    "patches of one code can look unlike each other."
)
#: Codes on the map, at most: those used most.
MOST_ON_MAP = 4096

CLICKS = """
element.addEventListener("click", (event) => {
  const found = event.target.closest("[data-number]");
  if (found) trigger("click", {number: Number(found.dataset.number)});
});
element.addEventListener("keydown", (event) => {
  const found = event.target.closest("[data-number]");
  if (found && event.key === "Enter" && found.tagName !== "BUTTON")
    trigger("click", {number: Number(found.dataset.number)});
});
"""
"""The script of a piece whose parts with ``data-number`` can be clicked: events have ``number``."""

STYLE = """
.tf-lead {font-size: 1rem; line-height: 1.5; max-width: 62rem; margin: 0 0 .4rem}
.tf-note {font-size: .86rem; opacity: .72; margin: .3rem 0}
.tf-pair {display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin: .2rem 0}
.tf-pair figure {margin: 0; width: 200px}
.tf-pair img {width: 200px; height: 200px}
.tf-pair.tf-small figure, .tf-pair.tf-small img {width: 128px; height: auto}
.tf-pair.tf-large figure, .tf-pair.tf-large img {width: 300px; height: auto}
.tf-asked img {width: 260px; height: 260px}
.tf img {image-rendering: pixelated; border-radius: 6px; display: block; margin: 0}
.tf figcaption {font-size: .86rem; margin-top: .3rem}
.tf-facts {display: flex; flex-direction: column; gap: .5rem; font-size: .86rem; flex: 1 1 180px;
  max-width: 21rem; line-height: 1.35}
.tf-facts b {font-size: 1.2rem; display: block; line-height: 1.25}
.tf-steps {display: grid; gap: .7rem; margin-top: .2rem;
  grid-template-columns: repeat(auto-fit, minmax(118px, 1fr))}
.tf-step {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .5rem;
  background: var(--background-fill-primary); max-width: 320px}
.tf-step h4 {margin: 0 0 .4rem; font-size: .92rem; font-weight: 600}
.tf-step h4 small {font-weight: 400; opacity: .7}
.tf-grid {display: grid; width: 100%; aspect-ratio: 1; gap: 1px; margin-bottom: .5rem}
.tf-token {border: 0; padding: 0; margin: 0; min-width: 0; min-height: 0; border-radius: 2px;
  cursor: pointer}
.tf-token:hover {outline: 2px solid var(--body-text-color); z-index: 1}
.tf-token.tf-chosen {outline: 3px solid var(--body-text-color); outline-offset: 1px; z-index: 2}
.tf-token.tf-swapped {box-shadow: inset 0 0 0 2px white, inset 0 0 0 3px black}
.tf-step img {width: 100%}
.tf-step p {margin: .35rem 0 0; font-size: .86rem}
.tf-bar {height: 4px; border-radius: 2px; background: var(--border-color-primary);
  margin-top: .2rem}
.tf-bar i {display: block; height: 4px; border-radius: 2px; background: var(--color-accent)}
.tf-examples {display: flex; flex-wrap: wrap; gap: .45rem}
.tf button, .tf img {margin: 0 !important}
.tf-examples button {border: 2px solid transparent; border-radius: 8px; padding: 0; cursor: pointer;
  background: none}
.tf-examples button:hover {border-color: var(--color-accent)}
.tf-examples img {width: 58px; height: 58px; image-rendering: auto}
.tf-code {display: flex; gap: .8rem; align-items: center; margin-bottom: .3rem}
.tf-swatch {width: 46px; height: 46px; border-radius: 8px; flex: none}
.tf-code h3 {margin: 0; font-size: 1.1rem}
.tf-patches {display: flex; flex-wrap: wrap; gap: 5px; margin: .2rem 0 .6rem}
.tf-patches img {width: 62px; height: 62px}
.tf-codes {display: flex; flex-wrap: wrap; gap: .45rem}
.tf-codes button {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 4px;
  cursor: pointer; background: var(--background-fill-primary); font-size: .78rem;
  text-align: center; color: inherit}
.tf-codes button:hover {border-color: var(--color-accent)}
.tf-codes img {width: 46px; height: 46px}
.tf-codes i {display: block; height: 8px; border-radius: 4px; margin: 3px 0 1px}
.tf h5 {margin: .4rem 0 .25rem; font-size: .95rem; font-weight: 600}
.tf-map {width: 100%; max-width: 600px; aspect-ratio: 1; border-radius: 10px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary)}
.tf-map circle:hover {stroke: var(--body-text-color); stroke-width: .35}
.tf-map circle.tf-chosen {stroke: var(--body-text-color); stroke-width: .5}
.tf-usage {width: 100%; height: 110px; display: block}
.tf-sheets {display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr))}
.tf-sheets img {width: 100%; max-width: 704px; image-rendering: auto}
"""


def picture(pixels: np.ndarray, about: str) -> str:
    """An image of ``pixels`` [h, w, 3] uint8, which says ``about`` where it cannot be seen."""
    code = base64.b64encode(png(np.ascontiguousarray(pixels))).decode()
    said = escape(about, quote=True)
    return f'<img src="data:image/png;base64,{code}" alt="{said}" title="{said}">'


def of_tensor(pixels: Tensor, about: str) -> str:
    """The same of a tensor [3, h, w] uint8."""
    return picture(pixels.permute(1, 2, 0).numpy(), about)


def framed(*parts: str) -> str:
    """A piece of the page."""
    return f'<div class="tf">{"".join(parts)}</div>'


def lead(text: str) -> str:
    """What a tab is about, in a few words of HTML of our own."""
    return framed(f'<p class="tf-lead">{text}</p>')


def side(scale: tuple[int, int]) -> str:
    """A scale's name: its rows and columns."""
    return f"{scale[0]} × {scale[1]}"


def _decibels(value: float) -> str:
    return "no difference" if math.isinf(value) else f"{value:.1f} dB"


def token_grid(
    codes: Codes,
    scale: tuple[int, int],
    tokens: Sequence[int],
    first: int,
    chosen: int | None = None,
    swapped: Sequence[int] = (),
) -> str:
    """A scale's tokens as coloured squares, which can be clicked.

    Args:
        tokens: of the scale, row by row.
        first: the number of its first token in the picture.
        chosen: the number of the token that is looked at.
        swapped: the numbers of tokens that are not the picture's own.
    """
    cells = []
    for at, code in enumerate(tokens):
        number = first + at
        marks = "tf-token" + " tf-chosen" * (number == chosen) + " tf-swapped" * (number in swapped)
        where = f"row {at // scale[1] + 1}, column {at % scale[1] + 1}"
        said = f"code {code}, {where}" + ", swapped" * (number in swapped)
        cells.append(
            f'<button class="{marks}" data-number="{number}" title="{said}" aria-label="{said}" '
            f'style="background:{codes.hex(code)}"></button>'
        )
    columns = f"grid-template-columns: repeat({scale[1]}, 1fr)"
    return f'<div class="tf-grid" style="{columns}">{"".join(cells)}</div>'


def steps(
    codes: Codes,
    scales: Sequence[tuple[int, int]],
    tokens: Tensor,
    images: Tensor,
    psnr: Sequence[float] | None = None,
    chosen: int | None = None,
    swapped: Sequence[int] = (),
) -> str:
    """A card for each scale: its tokens, and the picture decoded from all tokens so far.

    Args:
        scales: the sides of all of the tokenizer's scales.
        tokens: [l] of the first scales.
        images: [S, 3, H, W] uint8, after each of them.
        psnr: of the images, where there is an original.
    """
    cards, first, marked = [], 0, frozenset(swapped)
    for number, image in enumerate(images):
        scale = scales[number]
        count = scale[0] * scale[1]
        own = tokens[first : first + count].tolist()
        grid = token_grid(codes, scale, own, first, chosen, marked)  # type: ignore[arg-type]
        noun = "token" if count == 1 else "tokens"
        title = f"<h4>{side(scale)} <small>{count} {noun}</small></h4>"
        shown = of_tensor(image, f"the picture from the first {first + count} tokens")
        measured = ""
        if psnr is not None:
            share = min(1.0, max(0.0, psnr[number] / 40))
            measured = (
                f"<p>{_decibels(psnr[number])}</p>"
                f'<div class="tf-bar"><i style="width:{share:.0%}"></i></div>'
            )
        cards.append(f'<div class="tf-step">{title}{grid}{shown}{measured}</div>')
        first += count
    return framed(
        "<h5>The tokens, coarse to fine, and what is drawn from all tokens so far</h5>",
        f'<div class="tf-steps">{"".join(cards)}</div>',
    )


def comparison(picture_: TokenPicture, codebook: int) -> str:
    """Original and reconstruction side by side, with what they cost."""
    height, width = picture_.original.shape[-2:]
    count, bits = len(picture_.tokens), math.log2(codebook)
    size, plain = math.ceil(count * bits / 8), 3 * height * width
    swapped = picture_.swapped

    def figure(image: Tensor, caption: str) -> str:
        return f"<figure>{of_tensor(image, caption)}<figcaption>{caption}</figcaption></figure>"

    shown = [
        figure(picture_.original, f"the picture, {width} × {height} pixels"),
        figure(picture_.before, f"drawn again from its {count} tokens"),
    ]
    if swapped:
        noun = "token" if len(swapped) == 1 else "tokens"
        shown.append(figure(picture_.steps[-1], f"with {len(swapped)} {noun} swapped"))
    facts = (
        f'<div class="tf-facts"><div><b>{count} tokens</b>each one of {codebook:,} codes</div>'
        f"<div><b>{size:,} bytes</b>the pixels themselves are {plain:,}, "
        f"{plain / size:.0f} times as many</div>"
        f"<div><b>{_decibels(picture_.psnr[-1])}</b>how near the last picture is to the first "
        "(PSNR: more is nearer, and the eye hardly sees a difference from about 40 on)</div></div>"
    )
    return framed(f'<div class="tf-pair">{"".join(shown)}{facts}</div>')


def effect(picture_: TokenPicture) -> str:
    """What swapped tokens change, beside the field that swaps them; nothing where none is."""
    if not picture_.swapped:
        return framed('<p class="tf-note">Put another code in, and see here what it changes.</p>')
    before, after = picture_.before, picture_.steps[-1]
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
    return framed(f'<div class="tf-pair tf-small">{figures}</div>')


def examples(pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    """Small pictures to pick one of: (name, pixels) each."""
    buttons = (
        f'<button data-number="{number}" aria-label="{escape(name, quote=True)}">'
        f"{picture(pixels, name)}</button>"
        for number, (name, pixels) in enumerate(pictures)
    )
    return framed(f'<h5>Pick a picture</h5><div class="tf-examples">{"".join(buttons)}</div>')


def _patches(index: PatchIndex, code: int, scale: int, count: int) -> str:
    shown = []
    for patch in index.nearest(code, scale, count):
        where = f"row {patch.place.row + 1}, column {patch.place.column + 1}"
        own = "this code" if patch.code == code else f"code {patch.code}"
        about = f"{index.images.paths[patch.picture].name}, {where}: {own}"
        shown.append(picture(index.pixels(patch), about))
    return f'<div class="tf-patches">{"".join(shown)}</div>'


def code_card(index: PatchIndex, code: int, scale: int, where: str, shown: int = 16) -> str:
    """A code: how often it is used, and the patches of known pictures that are nearest to it.

    Args:
        scale: of the patches.
        where: the title's second half.
    """
    hits, total = int(index.hits[code]), int(index.hits.sum())
    own = (
        f"{hits:,} of {total:,} tokens of {len(index.images)} known pictures are this code"
        if hits
        else f"no token of {len(index.images)} known pictures is this code"
    )
    return framed(
        f'<div class="tf-code"><div class="tf-swatch" style="background:{index.codes.hex(code)}">'
        f'</div><div><h3>Code {code}{where}</h3><div class="tf-note">{own}</div></div></div>',
        f"<h5>What it stands for: the nearest patches at {side(index.sides[scale])}</h5>",
        _patches(index, code, scale, shown),
        f'<p class="tf-note">Nearest of {index.searched(scale):,} patches of {len(index.images)} '
        f"pictures, the nearest first.{LEFT_OVER if scale else ''}</p>",
    )


def token_place(place: Place) -> str:
    """Where a token stands, after its code."""
    where = side((place.height, place.width))
    return f" at {where}, row {place.row + 1}, column {place.column + 1}"


def neighbours(index: PatchIndex, code: int, scale: int, count: int = 8) -> str:
    """The codes nearest to one as buttons, each with the patch nearest to it."""
    buttons = []
    for other in index.codes.nearest(code, count):
        [patch] = index.nearest(other, scale, 1)
        image = picture(index.pixels(patch), f"code {other}")
        buttons.append(
            f'<button data-number="{other}">{image}'
            f'<i style="background:{index.codes.hex(other)}"></i>{other}</button>'
        )
    return framed(
        "<h5>Similar codes: click one to put it in this place</h5>",
        f'<div class="tf-codes">{"".join(buttons)}</div>',
    )


def code_map(index: PatchIndex, chosen: int | None = None) -> str:
    """The codes as dots on a plane, larger where they are used more; each can be clicked."""
    codes, usage = index.codes, index.hits
    order = usage.argsort(descending=True, stable=True)[:MOST_ON_MAP].tolist()
    largest = max(1, int(usage.max()))
    if chosen in order:  # above all others
        order.append(order.pop(order.index(chosen)))
    dots = []
    for code in order:
        x, y = (4 + 92 * codes.places[code]).tolist()
        hits = int(usage[code])
        radius = 0.45 + 1.1 * (hits / largest) ** 0.5
        mark = ' class="tf-chosen"' if code == chosen else ""
        dots.append(
            f'<circle{mark} data-number="{code}" cx="{x:.2f}" cy="{100 - y:.2f}" r="{radius:.2f}" '
            f'fill="{codes.hex(code)}"><title>code {code}: {hits:,} tokens</title></circle>'
        )
    left = ""
    if len(codes) > len(order):
        left = f" The {len(codes) - len(order):,} codes used least are left out."
    note = (
        f"{len(order):,} codes, flattened to the two directions in which they differ most "
        f"(principal components). Larger dots are used more.{left}"
    )
    return framed(
        f'<svg class="tf-map" viewBox="0 0 100 100" role="img" aria-label="map of the codes">'
        f"{''.join(dots)}</svg>",
        f'<p class="tf-note">{note}</p>',
    )


def usage_plot(index: PatchIndex) -> str:
    """How often codes are used, the most used first, on a logarithmic axis, as a filled line."""
    hits = np.sort(index.hits.numpy())[::-1]
    used, total = int((hits > 0).sum()), int(hits.sum())
    heights = np.log1p(hits) / np.log1p(hits[0])
    places = np.unique(np.linspace(0, len(hits) - 1, min(len(hits), 600)).round().astype(int))
    path = " ".join(f"{100 * at / len(hits):.2f},{30 - 29 * heights[at]:.2f}" for at in places)
    median = int(np.median(hits))
    return framed(
        f"<h5>{used:,} of {len(hits):,} codes are used ({used / len(hits):.1%})</h5>",
        f'<svg class="tf-usage" viewBox="0 0 100 30" preserveAspectRatio="none" role="img" '
        f'aria-label="use of each code"><polygon fill="var(--color-accent)" fill-opacity=".75" '
        f'points="0,30 {path} 100,30"/></svg>',
        f'<p class="tf-note">How often each code is one of {total:,} tokens of '
        f"{len(index.images)} pictures, the most used on the left ({int(hits[0]):,} times, the "
        f"middle one {median:,} times), on a logarithmic scale.</p>",
    )
