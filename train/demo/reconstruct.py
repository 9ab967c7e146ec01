"""The tab *reconstruct*: a picture, its tokens step by step, and the picture drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
import torch

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.data import DataError

from . import cards, grids, html, pictures
from .layout import Layout
from .parts import EVENT, KEPT, Examples, held, number, on_upload, read_upload, told, upload
from .patches import PatchIndex
from .pictures import TokenPicture

_WHAT = (
    "A <b>tokenizer</b> writes a picture down as a list of whole numbers, its <b>tokens</b>, and "
    "draws the picture again from them. "
)
_SCALES = "The first tokens stand for the whole picture, later ones for smaller and smaller parts. "
_GROUPS = "Each place has {count} tokens side by side, each for some of its channels: its groups. "
_ROUNDS = "Each place has {count} tokens one after the other, each for what is still missing. "
_CLICK = (
    "Each coloured square below is one token. <b>Click a square</b> to see what its number stands "
    "for, and to put another number in its place."
)


def lead(layout: Layout) -> str:
    """What the tab is about."""
    text = _WHAT + _SCALES * (len(layout.scales) > 1 and layout.scales[0] == (1, 1))
    text += _GROUPS.format(count=layout.groups) * (layout.groups > 1)
    return text + _ROUNDS.format(count=layout.depth) * (layout.depth > 1) + _CLICK


class Reconstruct:
    """What the tab does, without Gradio's components: functions of a session's state.

    Args:
        indices: of each of the tokenizer's indices.
    """

    def __init__(
        self, tokenizer: TokenFlowTokenizer, indices: Sequence[PatchIndex], examples: Examples
    ) -> None:
        self.tokenizer, self.indices, self.examples = tokenizer, indices, examples
        self.layout = Layout.of(tokenizer)
        self.codes = [index.codes for index in indices]

    @property
    def most_codes(self) -> int:
        """Codes of the largest index."""
        return max(map(len, self.codes))

    def first_chosen(self) -> int:
        """The token that is looked at first: in the middle of a scale of about 4 x 4."""
        scales = self.layout.scales
        scale = min(range(len(scales)), key=lambda at: abs(scales[at][0] - 4))
        height, width = scales[scale]
        numbers = self.layout.numbers(scale * self.layout.depth, 0)
        return numbers[height // 2 * width + width // 2]

    def show(self, picture: TokenPicture, chosen: int) -> tuple[Any, ...]:
        """State and pieces of the page: picture, chosen token, comparison, steps, code, similar
        codes, what swaps change, the number in the field."""
        code = int(picture.tokens[chosen])
        place = self.layout.place(chosen)
        index, step = self.indices[place.group], self.layout.step_of(place)
        where = cards.token_place(self.layout, place, index.codes.name)
        return (
            picture,
            chosen,
            grids.comparison(picture, self.codes, self.layout),
            grids.steps(
                self.codes,
                self.layout,
                picture.tokens,
                picture.steps,
                picture.psnr,
                chosen,
                picture.swapped,
            ),
            cards.code_card(index, code, step, where),
            cards.neighbours(index, code, step),
            grids.effect(picture, not pictures.is_drawn(self.tokenizer, index.codes.columns)),
            code,
        )

    def example(self, number: int) -> tuple[Any, ...]:
        """An example's number to what :meth:`show` gives."""
        image = self.examples.open(number)
        return self.show(pictures.encode(self.tokenizer, image), self.first_chosen())

    def uploaded(self, content: bytes) -> tuple[Any, ...]:
        """The bytes of a picture."""
        image = read_upload(content)
        return self.show(pictures.encode(self.tokenizer, image), self.first_chosen())

    def choose(self, picture: TokenPicture, number: int) -> tuple[Any, ...]:
        """Look at another token."""
        return self.show(picture, number)

    def swap(self, picture: TokenPicture, chosen: int, code: float | None) -> tuple[Any, ...]:
        """Put a code in the place of the chosen token."""
        if code is None or not float(code).is_integer():
            raise DataError("name a code by its number")
        return self.show(pictures.swap(self.tokenizer, picture, chosen, int(code)), chosen)

    def random(self, picture: TokenPicture, chosen: int) -> tuple[Any, ...]:
        """Put a code drawn at random in the place of the chosen token."""
        codes = self.codes[self.layout.place(chosen).group]
        code = int(torch.randint(len(codes), ()))
        return self.swap(picture, chosen, code)

    def put_back(self, picture: TokenPicture, chosen: int, all_of_them: bool) -> tuple[Any, ...]:
        """Undo the chosen token's swap, or all."""
        number = None if all_of_them else chosen
        return self.show(pictures.put_back(self.tokenizer, picture, number), chosen)


def build(
    page: gr.Blocks,
    tokenizer: TokenFlowTokenizer,
    indices: Sequence[PatchIndex],
    examples: Examples,
) -> None:
    """Lay the tab out, inside its ``gr.Tab``."""
    tab = Reconstruct(tokenizer, indices, examples)
    picture, chosen = (gr.State(None, time_to_live=KEPT) for _ in range(2))
    alike = len(set(map(len, tab.codes))) == 1
    any_code = f"0 to {tab.most_codes - 1}" if alike else "by its number in this group"
    gr.HTML(html.lead(lead(tab.layout)))
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            shelf = examples.show()
            file = upload()
        with gr.Column(scale=5, min_width=480):
            comparison = gr.HTML(elem_classes="tf-comparison")
    steps = gr.HTML(js_on_load=html.CLICKS, elem_classes="tf-all-steps")
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            card = gr.HTML(elem_classes="tf-chosen-code")
        with gr.Column(scale=3, min_width=320):
            similar = gr.HTML(js_on_load=html.CLICKS, elem_classes="tf-similar")
            code = gr.Number(label=f"or any code, {any_code}", precision=0)
            with gr.Row():
                put_in = gr.Button("Put it in", variant="primary", size="md", min_width=90)
                dice = gr.Button("Random", size="md", min_width=90)
                back = gr.Button("Put this back", size="md", min_width=90)
                all_back = gr.Button("Put all back", size="md", min_width=90)
            effect = gr.HTML(elem_classes="tf-effect")
    outputs = [picture, chosen, comparison, steps, card, similar, effect, code]

    @told
    def on_example(event: gr.EventData) -> tuple[Any, ...]:
        return tab.example(number(event, len(examples.paths)))

    @told
    def on_token(shown: TokenPicture | None, event: gr.EventData) -> tuple[Any, ...]:
        return tab.choose(held(shown), number(event, tab.layout.count))

    @told
    def on_code(shown: TokenPicture | None, at: int | None, event: gr.EventData) -> tuple[Any, ...]:
        return tab.swap(held(shown), held(at), number(event, tab.most_codes))

    @told
    def on_number(
        shown: TokenPicture | None, at: int | None, code: float | None
    ) -> tuple[Any, ...]:
        return tab.swap(held(shown), held(at), code)

    @told
    def on_random(shown: TokenPicture | None, at: int | None) -> tuple[Any, ...]:
        return tab.random(held(shown), held(at))

    @told
    def on_back(shown: TokenPicture | None, at: int | None) -> tuple[Any, ...]:
        return tab.put_back(held(shown), held(at), False)

    @told
    def on_all_back(shown: TokenPicture | None, at: int | None) -> tuple[Any, ...]:
        return tab.put_back(held(shown), held(at), True)

    page.load(told(lambda: tab.example(0)), None, outputs, **EVENT)
    shelf.click(on_example, None, outputs, **EVENT)
    on_upload(file, tab.uploaded, outputs)
    steps.click(on_token, picture, outputs, **EVENT)
    similar.click(on_code, [picture, chosen], outputs, **EVENT)
    put_in.click(on_number, [picture, chosen, code], outputs, **EVENT)
    code.submit(on_number, [picture, chosen, code], outputs, **EVENT)
    dice.click(on_random, [picture, chosen], outputs, **EVENT)
    back.click(on_back, [picture, chosen], outputs, **EVENT)
    all_back.click(on_all_back, [picture, chosen], outputs, **EVENT)
