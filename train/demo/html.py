"""What the page's own pieces of HTML are made of: style, pictures, frames. What comes from people
or files is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np
from torch import Tensor

from tokenflow_ext.train.data.outputs import png

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
.tf-step img {width: 100%; max-width: 320px}
.tf-steps.tf-many {grid-template-columns: repeat(auto-fit, minmax(330px, 1fr))}
.tf-many .tf-step {max-width: 660px}
.tf-groups {display: grid; gap: .5rem; margin-bottom: .5rem;
  grid-template-columns: repeat(auto-fill, minmax(140px, 1fr))}
.tf-groups small {opacity: .7}
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
.tf-table, .tf-table tr {border: 0 !important}
.tf-table {border-collapse: collapse; font-size: .86rem; margin: .3rem 0}
.tf-table td, .tf-table th {padding: .15rem .7rem; text-align: right; font-weight: 400;
  border: 0; border-bottom: 1px solid var(--border-color-primary)}
.tf-table th:first-child {text-align: left}
.tf-digits {display: flex; flex-wrap: wrap; gap: 3px; margin: .2rem 0 .5rem; font-size: .8rem}
.tf-digits span {min-width: 1.6em; padding: 1px 4px; text-align: center; border-radius: 4px;
  border: 1px solid var(--border-color-primary)}
.tf-channels {display: grid; grid-template-columns: auto 1fr; gap: 3px .7rem; font-size: .8rem;
  align-items: center; max-width: 40rem}
.tf-channels div {display: flex; height: 1.4em; border-radius: 4px; overflow: hidden}
.tf-channels i {display: block; overflow: hidden; text-align: center; font-style: normal;
  color: black; white-space: nowrap}
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


def examples(pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    """Small pictures to pick one of: (name, pixels) each."""
    buttons = (
        f'<button data-number="{number}" aria-label="{escape(name, quote=True)}">'
        f"{picture(pixels, name)}</button>"
        for number, (name, pixels) in enumerate(pictures)
    )
    return framed(f'<h5>Pick a picture</h5><div class="tf-examples">{"".join(buttons)}</div>')
