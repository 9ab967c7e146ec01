"""The tab *draw*: a prompt or a class to a picture, whose scales appear one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from tokenflow_ext.sampler import PRESETS
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.text_files import check_text
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator, ImageGenerator

from . import grids, html
from .indices import codes_of
from .layout import Layout
from .parts import EVENT, told
from .pictures import decode_steps
from .streaming import streamed

LEAD = (
    "The model draws as a tokenizer reads, coarse to fine. It first chooses the one token that "
    "stands for the whole picture, then the tokens of smaller and smaller parts, each time looking "
    "at all that it has chosen so far. The same words and the same seed give the same picture."
)
#: Whole numbers that a page in the browser holds exactly.
MOST_SEED = 2**53 - 1


class Draw:
    """What the tab does, without Gradio's components."""

    def __init__(self, generator: ImageGenerator | ClassImageGenerator) -> None:
        self.generator, self.tokenizer = generator, generator.model.tokenizer
        self.codes, self.layout = codes_of(self.tokenizer), Layout.of(self.tokenizer)

    def pictures(self, prompt: str, seed: float | None, **settings: Any) -> Iterator[str]:
        """The page's piece after each scale; the last has the picture of ``tokenflow generate`` or
        ``sample`` with this seed.

        Args:
            settings: attributes of the generator, for this picture alone.

        Raises:
            DataError: a prompt that is no text, no such class, or no seed.
        """
        if seed is None or not float(seed).is_integer() or not 0 <= seed <= MOST_SEED:
            raise DataError(f"the seed must be a whole number from 0 to {MOST_SEED}, got {seed}")
        check_text(prompt, "the prompt")
        generator, number = replace(self.generator, **settings), int(seed)

        def work(emit: Callable[[tuple[Tensor, Tensor | None]], None]) -> None:
            so_far = torch.empty(0)

            def on_scale(tokens: Tensor) -> None:
                nonlocal so_far
                so_far = tokens[0].cpu()
                emit((so_far, None))

            for image in generator.draw([prompt], [number], on_scale):
                emit((so_far, image))

        steps: list[Tensor] = []
        for tokens, image in streamed(work):
            if image is None:
                steps.append(decode_steps(self.tokenizer, tokens, last=True)[0])
            else:
                steps[-1] = image
            yield self._shown(tokens, steps, prompt)

    def _shown(self, tokens: Tensor, steps: list[Tensor], prompt: str) -> str:
        count, every = len(steps), len(self.layout.scales)
        made = html.of_tensor(steps[-1], f"{prompt}: after {count} of {every} scales")
        noun = "token" if len(tokens) == 1 else "tokens"
        caption = f"{len(tokens)} {noun}, {count} of {every} scales"
        large = f"<figure>{made}<figcaption>{caption}</figcaption></figure>"
        cards = grids.steps(self.codes, self.layout, tokens, torch.stack(steps))
        return html.framed(f'<div class="tf-pair tf-large">{large}</div>') + cards


def build(generator: ImageGenerator | ClassImageGenerator) -> None:
    """Lay the tab out, inside its ``gr.Tab``."""
    tab = Draw(generator)
    gr.HTML(html.lead(LEAD))
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            if isinstance(generator, ClassImageGenerator):
                config = generator.model.config
                names = list(config.class_names or map(str, range(config.classes)))
                prompt: Any = gr.Dropdown(names, value=names[0], label="what to draw")
            else:
                most = generator.model.config.prompt_length
                prompt = gr.Textbox(
                    label="what to draw, in words",
                    info=f"The first {most} text tokens are read. Without words: anything.",
                    lines=2,
                    max_length=1000,
                )
            guidance = gr.Slider(
                0,
                15,
                generator.guidance,
                step=0.1,
                label="guidance",
                info="How closely to follow what is asked for. Too much makes pictures crude.",
            )
            options: list[Any] = [guidance]
            if isinstance(generator, ImageGenerator):
                steps = gr.Radio(
                    list(PRESETS),
                    value=generator.steps,
                    label="steps",
                    info="How often each scale is drawn anew. One is the fastest.",
                )
                options.append(steps)
            seed = gr.Number(
                0, label="seed", precision=0, minimum=0, maximum=MOST_SEED, min_width=120
            )
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=4, min_width=480):
            drawn = gr.HTML(elem_classes="tf-drawn")

    @told
    def on_draw(text: str, number: float | None, *chosen: Any) -> Iterator[str]:
        settings = dict(zip(("guidance", "steps"), chosen, strict=False))
        yield from tab.pictures(text or "", number, **settings)

    button.click(on_draw, [prompt, seed, *options], drawn, **EVENT)
    if isinstance(generator, ImageGenerator):
        prompt.submit(on_draw, [prompt, seed, *options], drawn, **EVENT)
