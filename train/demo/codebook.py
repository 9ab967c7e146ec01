"""The tab *codebook*: how often codes are used, a map of them, and which pictures share one."""

from __future__ import annotations

from typing import Any

import gradio as gr

from tokenflow_ext.models.metrics import code_usage
from tokenflow_ext.train.evaluation.cluster_pictures import sheet_of

from . import html
from .parts import EVENT, number, told
from .patches import PatchIndex

LEAD = (
    "The <b>codebook</b> is the list of everything that one token can say. Near codes mean like "
    "things, and have like colours. A good tokenizer uses most of its codes. <b>Click a dot</b> to "
    "see what its code stands for."
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
        title = f"By {_SHARED[entry.by]} ({filled:.0%} of its codes have a picture)"
        about = f"pictures by their code, {entry.by}"
        parts.append(f"<div><h5>{title}</h5>{html.picture(sheet, about)}</div>")
    return html.framed(
        "<h5>Pictures that share a code</h5>"
        f'<p class="tf-note">Each of {len(index.images)} pictures by the code that is nearest to '
        "its mean feature, the largest groups first.</p>",
        f'<div class="tf-sheets">{"".join(parts)}</div>',
    )


def build(index: PatchIndex) -> None:
    """Lay the tab out, inside its ``gr.Tab``."""
    first = int(index.hits.argmax())

    def show(code: int) -> tuple[str, str]:
        card = html.code_card(index, code, index.scale_of(code), "", shown=24)
        return html.code_map(index, code), card

    begun = show(first)
    gr.HTML(html.lead(LEAD))
    with gr.Row():
        with gr.Column(scale=3, min_width=420):
            plane = gr.HTML(begun[0], js_on_load=html.CLICKS, elem_classes="tf-plane")
        with gr.Column(scale=3, min_width=360):
            card = gr.HTML(begun[1], elem_classes="tf-mapped-code")
            gr.HTML(html.usage_plot(index))
    gr.HTML(clusters(index))

    @told
    def on_dot(event: gr.EventData) -> tuple[Any, ...]:
        return show(number(event, len(index.codes)))

    plane.click(on_dot, None, [plane, card], **EVENT)
