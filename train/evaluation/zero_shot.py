"""Zero-shot classification: which class's name, by CLIP's text tower, is nearest to an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tokenflow_ext.models import WeightsError
from tokenflow_ext.models.serialization.transformers_folder import FILES_ALONE
from tokenflow_ext.train.tasks.language import reading

PROMPT = "a photo of a {}."
WANTED = (
    "a folder of transformers with CLIP's text tower (config.json, model.safetensors, "
    "tokenizer.json), such as openai/clip-vit-base-patch16"
)


@torch.no_grad()
def name_embeddings(folder: str, names: Sequence[str]) -> np.ndarray:
    """Unit embeddings [n, D] of classes by their names, underscores as spaces.

    Args:
        folder: see :data:`WANTED`.

    Raises:
        WeightsError: no such folder, or one of another model.
    """
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    if not (Path(folder) / "config.json").is_file():
        raise WeightsError(f"no CLIP at {folder}: wanted is {WANTED}")
    with reading(f"CLIP at {folder}", WeightsError):
        text = AutoTokenizer.from_pretrained(folder, **FILES_ALONE)
        tower = CLIPTextModelWithProjection.from_pretrained(folder, **FILES_ALONE).eval()
    prompts = [PROMPT.format(name.replace("_", " ")) for name in names]
    given = text(prompts, padding=True, return_tensors="pt")
    ids = {key: given[key] for key in ("input_ids", "attention_mask")}
    found = tower(**ids).text_embeds
    return torch.nn.functional.normalize(found.float(), dim=-1).numpy()


def zero_shot(features: np.ndarray, labels: Sequence[str], names: np.ndarray) -> float:
    """Share of images whose class's embedding is the nearest, by cosine.

    Args:
        features: [n, D] of images.
        labels: their classes.
        names: [k, D], of the classes in alphabetical order.
    """
    classes = sorted(set(labels))
    nearest = (features.astype(np.float64) @ names.astype(np.float64).T).argmax(1)
    return float(np.mean([classes[i] == label for i, label in zip(nearest, labels, strict=True)]))
