"""A trained text-to-image model, as it draws."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from tokenflow_ext.models import CheckpointError
from tokenflow_ext.models.serialization.transformers_folder import answers, answers_and_draws
from tokenflow_ext.models.text_to_image.model import TextToImage
from tokenflow_ext.sampler import MultiStepSampler, SamplingConfig
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import find_device

from .language import load_drawing_side, load_text_tokenizer


@dataclass
class ImageGenerator:
    """A model and how it draws.

    Attributes:
        negative: the text that guidance leads away from; training drops captions to "".
        batch: images drawn at once. An image does not depend on it.
        weights: SHA-256 of the model's, which pictures are marked with.
    """

    model: TextToImage
    text_tokenizer: Any
    steps: str = "three"
    guidance: float = 7.5
    negative: str = ""
    batch: int = 16
    weights: str = ""

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", **options: Any) -> ImageGenerator:
        """From a run, one of its checkpoints, or a folder with a saved model and text tokenizer; a
        model that answers too is one.

        Raises:
            CheckpointError: nothing there, or not whole.
            ConfigError: no such device.
        """
        place = find_device(device)
        folder = checkpoint.find(path)
        if answers_and_draws(folder):
            model, text = load_drawing_side(folder)
            parts = [checkpoint.weights_digest(folder)]
        elif answers(folder):
            raise CheckpointError(f"the model in {folder} answers questions and does not draw")
        else:
            text = load_text_tokenizer(folder)
            model = TextToImage.from_pretrained(folder)
            parts = [checkpoint.weights_digest(part) for part in (folder, folder / "tokenizer")]
        weights = hashlib.sha256("".join(parts).encode()).hexdigest()
        return cls(model.to(place), text, weights=weights, **options)

    @property
    def facts(self) -> dict[str, str]:
        """What a picture depends on besides its prompt and seed."""
        return {**facts(self.steps, self.guidance, self.negative), "weights": self.weights}

    @property
    def runs(self) -> int:
        """Runs of the transformer for one batch: the first scale is drawn once."""
        return MultiStepSampler.of(self.sampling, self.model.config.scales).model_runs

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return SamplingConfig.preset(self.steps, guidance=self.guidance)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Generator[Tensor, None, None]:
        """Images [3, H, W] uint8, one for each prompt; a bar counts the transformer's runs.

        Args:
            seeds: any whole numbers, of which 64 bits count.
        """
        seeds = [(operator.index(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]
        batches = -(-len(prompts) // self.batch)
        with tqdm(total=batches * self.runs, unit="run", dynamic_ncols=True) as bar:
            # Every run ends in the last norm.
            hook = self.model.model.norm.register_forward_hook(lambda *_: bar.update() and None)
            try:
                for start in range(0, len(prompts), self.batch):
                    yield from self.model.generate(
                        prompts[start : start + self.batch],
                        self.text_tokenizer,
                        negative_prompt=self.negative,
                        sampling=self.sampling,
                        seed=seeds[start : start + self.batch],
                    ).cpu()
            finally:
                hook.remove()


def facts(steps: str, guidance: float, negative: str) -> dict[str, str]:
    """How pictures are drawn, as their files say it."""
    return {"steps": steps, "guidance": repr(float(guidance)), "negative": negative}
