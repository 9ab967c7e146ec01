"""A trained model of text to image or of classes, as it draws."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokenflow_ext.models import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.transformers_folder import answers, answers_and_draws
from tokenflow_ext.models.text_to_image.generation import OnScale
from tokenflow_ext.models.text_to_image.model import TextToImage
from tokenflow_ext.models.var.model import SAMPLING, VAR
from tokenflow_ext.sampler import MultiStepSampler, SamplingConfig
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import find_device
from tokenflow_ext.train.engine.precision import find_dtype

from .language import load_drawing_side, load_text_tokenizer


@dataclass
class ImageGenerator:
    """A model and how it draws.

    Attributes:
        negative: the text that guidance leads away from; training drops captions to "".
        batch: images drawn at once. An image does not depend on it.
        weights: SHA-256 of the model's, which pictures are marked with.
        dtype: of the transformer; the image tokenizer is in float32.
    """

    model: TextToImage
    text_tokenizer: Any
    steps: str = "three"
    guidance: float = 7.5
    negative: str = ""
    batch: int = 16
    weights: str = ""
    dtype: str = "float32"

    @classmethod
    def load(
        cls, path: str | Path, device: str = "auto", dtype: str = "float32", **options: Any
    ) -> ImageGenerator:
        """From a run, one of its checkpoints, or a folder with a saved model and text tokenizer; a
        model that answers too is one.

        Raises:
            CheckpointError: nothing there, or not whole.
            ConfigError: no such device.
        """
        place, kind = find_device(device), find_dtype(dtype)
        folder = checkpoint.find(path)
        if VAR.is_saved(folder):
            raise CheckpointError(f"the model in {folder} draws classes: use tokenflow sample")
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
        model = model.to(device=place, dtype=kind)
        return cls(model, text, weights=weights, dtype=dtype, **options)

    @property
    def facts(self) -> dict[str, str]:
        """What a picture depends on besides its prompt and seed."""
        return {
            **facts(self.steps, self.guidance, self.negative, self.dtype),
            "weights": self.weights,
        }

    @property
    def runs(self) -> int:
        """Runs of the transformer for one batch: the first scale is drawn once."""
        return MultiStepSampler.of(self.sampling, self.model.config.scales).model_runs

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return SamplingConfig.preset(self.steps, guidance=self.guidance)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_scale: OnScale | None = None,
    ) -> Generator[Tensor, None, None]:
        """Images [3, H, W] uint8, one for each prompt; a bar counts the transformer's runs.

        Args:
            seeds: any whole numbers, of which 64 bits count.
            on_scale: see :meth:`TextToImage.generate_tokens`.
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
                        on_scale=on_scale,
                    ).cpu()
            finally:
                hook.remove()


@dataclass
class ClassImageGenerator:
    """A class-conditional model and how it draws; a prompt is a class's name, or its number.

    Attributes:
        top_k, top_p, guidance: see :meth:`VAR.generate_tokens`.
        more_smooth: see :meth:`VAR.generate`.
        batch: images drawn at once. An image does not depend on it.
        weights: SHA-256 of the model's, which pictures are marked with.
        dtype: of the transformer; the image tokenizer is in float32.
    """

    model: VAR
    guidance: float = SAMPLING.guidance
    top_k: int = SAMPLING.top_k[0]
    top_p: float = SAMPLING.top_p[0]
    more_smooth: bool = False
    batch: int = 16
    weights: str = ""
    dtype: str = "float32"

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        tokenizer: str | Path | None = None,
        dtype: str = "float32",
        **options: Any,
    ) -> ClassImageGenerator:
        """From a run, one of its checkpoints, a folder with a saved model, or a released file.

        Args:
            tokenizer: the image tokenizer of a released file; a folder has its own.

        Raises:
            CheckpointError: nothing there, not whole, or another kind of model.
            ConfigError: no such device, or a tokenizer too many or too few.
        """
        place, kind = find_device(device), find_dtype(dtype)
        path = checkpoint.check_there(path)
        released = checkpoint.is_released(path)
        if released != (tokenizer is not None):
            raise ConfigError(
                f"--tokenizer is missing: {path} is a file of weights alone"
                if released
                else f"--tokenizer is for a released file, and {path} has its own"
            )
        if released:
            beside, where = checkpoint.load_tokenizer(str(tokenizer))
            model, places = VAR.from_released(path, beside), [Path(path), where]
        else:
            folder = checkpoint.find(path)
            if not VAR.is_saved(folder):
                raise CheckpointError(
                    f"the model in {folder} draws prompts: use tokenflow generate"
                )
            model, places = VAR.from_pretrained(folder), [folder, folder / "tokenizer"]
        parts = [checkpoint.weights_digest(part) for part in places]
        weights = hashlib.sha256("".join(parts).encode()).hexdigest()
        model = model.to(device=place, dtype=kind)
        return cls(model, weights=weights, dtype=dtype, **options)

    @property
    def facts(self) -> dict[str, str]:
        """What a picture depends on besides its class and seed."""
        names = ("guidance", "top_k", "top_p", "more_smooth", "weights")
        return {name: str(getattr(self, name)) for name in names} | _dtype_fact(self.dtype)

    def labels(self, prompts: Sequence[str]) -> list[int]:
        """The classes of these names.

        Raises:
            DataError: no such class.
        """
        try:
            return self.model.config.class_numbers(prompts)
        except ValueError as error:
            raise DataError(str(error)) from error

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_scale: OnScale | None = None,
    ) -> Generator[Tensor, None, None]:
        """Images [3, H, W] uint8, one for each class; a bar counts them.

        Args:
            on_scale: see :meth:`VAR.generate_tokens`.

        Raises:
            DataError: no such class.
        """
        labels = torch.tensor(self.labels(prompts))
        with tqdm(total=len(labels), unit="image", dynamic_ncols=True) as bar:
            for start in range(0, len(labels), self.batch):
                drawn = self.model.generate(
                    labels[start : start + self.batch],
                    guidance=self.guidance,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    more_smooth=self.more_smooth,
                    seed=seeds[start : start + self.batch],
                    on_scale=on_scale,
                )
                bar.update(len(drawn))
                yield from drawn.cpu()


def load_generator(
    path: str | Path, device: str = "auto", **options: Any
) -> ImageGenerator | ClassImageGenerator:
    """What draws with the model at ``path``, of prompts or of classes.

    Args:
        options: of the generator's class; None is its default.

    Raises:
        CheckpointError, ConfigError: see :meth:`ImageGenerator.load`; or an option that is not for
            this kind of model.
    """
    path = checkpoint.check_there(path)
    kind = ClassImageGenerator if VAR.is_saved(checkpoint.find(path)) else ImageGenerator
    known = {field.name for field in fields(kind)}
    given = {name: value for name, value in options.items() if value is not None}
    if strange := sorted(set(given) - known):
        raise ConfigError(f"--{strange[0].replace('_', '-')} is not for the model at {path}")
    return kind.load(path, device, **given)


def facts(steps: str, guidance: float, negative: str, dtype: str = "float32") -> dict[str, str]:
    """How pictures are drawn, as their files say it."""
    said = {"steps": steps, "guidance": repr(float(guidance)), "negative": negative}
    return said | _dtype_fact(dtype)


def _dtype_fact(dtype: str) -> dict[str, str]:
    """The type, but for that of files which do not say it."""
    return {} if dtype == "float32" else {"dtype": dtype}
