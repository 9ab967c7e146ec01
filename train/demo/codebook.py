"""The tab *codebook*: how often codes are used, a map of them, and which pictures share one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from tokenflow_ext.models.metrics import code_usage
from tokenflow_ext.train.evaluation.cluster_pictures import sheet_of

from . import cards, html
from .codes import TableCodes
from .parts import EVENT, number, told
from .patches import PatchIndex

LEAD = (
    "The <b>codebook</b> is the list of everything that one token can say. Near codes mean like "
    "things, and have like colours. A good tokenizer uses most of its codes. <b>Click a dot</b> to "
    "see what its code stands for."
)
#: The same of codes without a table.
LEAD_DIGITS = (
    "A <b>code</b> is everything that one token can say. Here it is a digit for each of a few "
    "channels: nothing is looked up, and near codes differ in few digits. A good tokenizer uses "
    "every digit of every channel. <b>Click a code</b> to see what it stands for."
)
_CLUSTERS, _MEMBERS = 6, 10
#: What the pictures of a cluster have in common, for each codebook.
_SHARED = {
    "joint": "both codebooks together",
    "semantic": "the semantic codebook: what is seen",
    "pixel": "the pixel codebook: what it looks like",
}


def clusters(index: PatchIndex) -> str:
    """The largest clusters of each codebook, as ``tokenflow analyse`` draws them."""
    parts = []
    for entry in index.clusters:
        sheet, _ = sheet_of(entry, index.images, _CLUSTERS, _MEMBERS)
        filled, _ = code_usage(entry.counts)
        by = _SHARED.get(entry.by, f"the group {entry.by}")
        title = f"By {by} ({filled:.0%} of its codes have a picture)"
        about = f"pictures by their code, {entry.by}"
        parts.append(f"<div><h5>{title}</h5>{html.picture(sheet, about)}</div>")
    return html.framed(
        "<h5>Pictures that share a code</h5>"
        f'<p class="tf-note">Each of {len(index.images)} pictures by the code that is nearest to '
        "its mean feature, the largest groups first.</p>",
        f'<div class="tf-sheets">{"".join(parts)}</div>',
    )


def code(index: PatchIndex, chosen: int) -> tuple[str, str]:
    """All codes of an index, and one of them."""
    card = cards.code_card(index, chosen, index.step_of(chosen), "", shown=24)
    return cards.plane(index, chosen), card


def whole(index: PatchIndex) -> tuple[str, str, str, str]:
    """An index: its codes, that which is used most, how often all are, and its clusters."""
    found = code(index, int(index.hits.argmax()))
    return (*found, cards.usage_plot(index), clusters(index))


def build(indices: Sequence[PatchIndex]) -> None:
    """Lay the tab out, inside its ``gr.Tab``.

    Args:
        indices: of each of a tokenizer's indices.
    """
    begun = whole(indices[0])
    names = [index.codes.name for index in indices]
    gr.HTML(html.lead(LEAD if isinstance(indices[0].codes, TableCodes) else LEAD_DIGITS))
    if len(indices) > 1 or len(indices[0].layout.steps) > 1:
        gr.HTML(cards.usage_table(indices), elem_classes="tf-use")
    group: Any = gr.State(names[0])
    if len(indices) > 1:
        group = gr.Radio(names, value=names[0], label="codes of the group")
    with gr.Row():
        with gr.Column(scale=3, min_width=420):
            plane = gr.HTML(begun[0], js_on_load=html.CLICKS, elem_classes="tf-plane")
        with gr.Column(scale=3, min_width=360):
            card = gr.HTML(begun[1], elem_classes="tf-mapped-code")
            usage = gr.HTML(begun[2], elem_classes="tf-used")
    shared = gr.HTML(begun[3], elem_classes="tf-shared")

    @told
    def on_code(name: str, event: gr.EventData) -> tuple[Any, ...]:
        index = indices[names.index(name)]
        return code(index, number(event, len(index.codes)))

    @told
    def on_group(name: str) -> tuple[Any, ...]:
        return whole(indices[names.index(name)])

    plane.click(on_code, group, [plane, card], **EVENT)
    if len(indices) > 1:
        group.input(on_group, group, [plane, card, usage, shared], **EVENT)
