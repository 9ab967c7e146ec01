"""What a code stands for, which codes there are, and how often they are used."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
import torch

from tokenflow_ext import CodebookUsage

from .codes import TableCodes, hex_of, hexes
from .digits import DigitCodes
from .html import framed, picture
from .layout import Layout, Place
from .patches import PatchIndex

LEFT_OVER = (
    " After the first scale or round a token stands for what earlier tokens have left out, so that "
    "patches of one code can look unlike each other."
)
#: Codes on the map, at most: those used most.
MOST_ON_MAP = 4096
#: Codes of a kind without a map that are shown by themselves: those used most.
_MOST_USED = 24


def _patches(index: PatchIndex, code: int, step: int, count: int) -> str:
    shown = []
    for patch in index.nearest(code, step, count):
        where = f"row {patch.place.row + 1}, column {patch.place.column + 1}"
        own = "this code" if patch.code == code else f"code {patch.code}"
        about = f"{index.images.paths[patch.picture].name}, {where}: {own}"
        shown.append(picture(index.pixels(patch), about))
    return f'<div class="tf-patches">{"".join(shown)}</div>'


def _digits(codes: DigitCodes, code: int) -> str:
    """A code's digits, channel by channel."""
    digits = codes.digits(torch.tensor([code]))[0].tolist()
    cells = "".join(
        f'<span title="channel {channel + 1}">{codes.shown(channel, digit)}</span>'
        for channel, digit in enumerate(digits)
    )
    return (
        f"<h5>Its {codes.word}s, channel by channel</h5>" + f'<div class="tf-digits">{cells}</div>'
    )


def code_card(index: PatchIndex, code: int, step: int, where: str, shown: int = 16) -> str:
    """A code: how often it is used, and the patches of known pictures that are nearest to it.

    Args:
        step: of the patches.
        where: the title's second half.
    """
    hits, total = int(index.hits[code]), int(index.hits.sum())
    own = (
        f"{hits:,} of {total:,} tokens of {len(index.images)} known pictures are this code"
        if hits
        else f"no token of {len(index.images)} known pictures is this code"
    )
    digits = _digits(index.codes, code) if isinstance(index.codes, DigitCodes) else ""
    return framed(
        '<div class="tf-code">'
        f'<div class="tf-swatch" style="background:{hex_of(index.codes, code)}"></div>'
        f'<div><h3>Code {code}{where}</h3><div class="tf-note">{own}</div></div></div>',
        digits,
        f"<h5>What it stands for: the nearest patches at {index.layout.name(step)}</h5>",
        _patches(index, code, step, shown),
        f'<p class="tf-note">Nearest of {index.searched(step):,} patches of {len(index.images)} '
        f"pictures, the nearest first.{LEFT_OVER if step else ''}</p>",
    )


def token_place(layout: Layout, place: Place, group: str) -> str:
    """Where a token stands, after its code."""
    where = f" at {layout.name(layout.step_of(place))}, row {place.row + 1}, column "
    return f"{where}{place.column + 1}" + (f", {group}" if group else "")


def _buttons(index: PatchIndex, codes: Sequence[tuple[int, str]], step: int) -> str:
    """Codes with a name each as buttons, with the patch nearest to each."""
    buttons = []
    colours = hexes(index.codes, [code for code, _ in codes])
    for (code, name), colour in zip(codes, colours, strict=True):
        [patch] = index.nearest(code, step, 1)
        image = picture(index.pixels(patch), f"code {code}")
        buttons.append(
            f'<button data-number="{code}">{image}<i style="background:{colour}"></i>{name}'
            "</button>"
        )
    return f'<div class="tf-codes">{"".join(buttons)}</div>'


def neighbours(index: PatchIndex, code: int, step: int) -> str:
    """The codes most like one as buttons: the nearest of a table, or all that differ in a digit."""
    if isinstance(index.codes, DigitCodes):
        title = f"Change one {index.codes.word}: click one to put that code in this place"
        found = index.codes.similar(code, 2 * len(index.codes.code.counts))
    else:
        title = "Similar codes: click one to put it in this place"
        found = index.codes.similar(code, 8)
    return framed(f"<h5>{title}</h5>", _buttons(index, found, step))


def plane(index: PatchIndex, chosen: int) -> str:
    """All codes to choose from: a map of a table's; of others, what their channels are."""
    if isinstance(index.codes, TableCodes):
        return code_map(index, index.codes, chosen)
    assert isinstance(index.codes, DigitCodes)
    order = index.hits.argsort(descending=True, stable=True)[:_MOST_USED].tolist()
    used = [(code, str(code)) for code in order if index.hits[code]]
    return channels(index, index.codes) + framed(
        "<h5>The codes used most: click one to see what it stands for</h5>",
        _buttons(index, used, index.step_of(chosen)),
    )


def code_map(index: PatchIndex, codes: TableCodes, chosen: int | None = None) -> str:
    """The codes as dots on a plane, larger where they are used more; each can be clicked."""
    usage = index.hits
    order = usage.argsort(descending=True, stable=True)[:MOST_ON_MAP].tolist()
    largest = max(1, int(usage.max()))
    if chosen in order:  # above all others
        order.append(order.pop(order.index(chosen)))
    dots = []
    for code, colour in zip(order, hexes(codes, order), strict=True):
        x, y = (4 + 92 * codes.places[code]).tolist()
        hits = int(usage[code])
        radius = 0.45 + 1.1 * (hits / largest) ** 0.5
        mark = ' class="tf-chosen"' if code == chosen else ""
        dots.append(
            f'<circle{mark} data-number="{code}" cx="{x:.2f}" cy="{100 - y:.2f}" r="{radius:.2f}" '
            f'fill="{colour}"><title>code {code}: {hits:,} tokens</title></circle>'
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


def channels(index: PatchIndex, codes: DigitCodes) -> str:
    """How often each channel has each of its digits, and why there is no map."""
    counts = codes.code.counts
    each = "2" if set(counts) == {2} else " × ".join(map(str, counts))
    patterns = f"2 to the {len(counts)}" if set(counts) == {2} else each
    rows, bits = [], 0.0
    for channel, often in enumerate(codes.counts(index.hits)):
        total = sum(often)
        bits -= sum(n / total * math.log2(n / total) for n in often if n)
        bars = []
        for digit, number in enumerate(often):
            level = digit / (len(often) - 1)
            red, green, blue = colorsys.hls_to_rgb(0.6, 0.55 + 0.35 * level, 0.6)
            colour = "#" + bytes(round(255 * part) for part in (red, green, blue)).hex()
            said = f"{codes.shown(channel, digit)}: {number / total:.1%} of the tokens"
            bars.append(
                f'<i title="{said}" style="width:{number / total:.2%};background:{colour}">'
                f"{codes.shown(channel, digit)}</i>"
            )
        rows.append(f"<span>channel {channel + 1}</span><div>{''.join(bars)}</div>")
    return framed(
        f"<h5>How often each channel has each {codes.word}: {bits:.1f} of "
        f"{codes.code.bits:.1f} bits are used</h5>",
        f'<div class="tf-channels">{"".join(rows)}</div>',
        f'<p class="tf-note">There is no map of the codes: {codes.word}s have no table. A code is '
        f"the {codes.word}s of {len(counts)} channels, each of the {patterns} = {len(codes):,} "
        "patterns is one, and none of them is learned. So the channels are shown instead. Their "
        "bits are the entropies of each channel by itself, summed: what channels have in common is "
        "not taken off.</p>",
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


def usage_table(indices: Sequence[PatchIndex]) -> str:
    """How many codes of each index are used, in all and at each step, with the perplexity."""
    layout = indices[0].layout
    steps = range(len(layout.steps)) if len(layout.steps) > 1 else ()
    names = ["codes", "used", "perplexity", *(f"used at {layout.name(step)}" for step in steps)]
    rows = []
    for index in indices:
        whole = CodebookUsage.from_hits(index.hits)
        cells = [f"{len(index.codes):,}", f"{float(whole.share):.1%}"]
        cells.append(f"{float(whole.perplexity):,.1f}")
        cells += [f"{float((index.usage[step] > 0).double().mean()):.1%}" for step in steps]
        name = index.codes.name or "all"
        rows.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("group", *names))
    by = " by group" * (len(indices) > 1)
    return framed(
        f"<h5>Use of the codes{by}, in {len(indices[0].images)} pictures</h5>",
        f'<div style="overflow-x:auto"><table class="tf-table"><tr>{head}</tr>{"".join(rows)}'
        "</table></div>",
        '<p class="tf-note">Perplexity: so many codes, all used as often, would say as much.</p>',
    )
