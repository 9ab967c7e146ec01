"""A folder of transformers: a header, and weights in one file or in several with an index."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import CheckpointError
from .files import OutputError, brief, cannot_write, read_json

HEADER = "config.json"
TEXT_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these is in a folder that has a text tokenizer."""

FILES_ALONE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""To every call of transformers that reads a folder: nothing is fetched, no code of it is run."""


def read_header(path: str | Path, instead: str = "llama_config") -> dict[str, Any]:
    """``config.json`` in the folder, or beside the file.

    Args:
        instead: what can be given in its place, for the message.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / HEADER
    if not file.exists():
        raise CheckpointError(f"{file} is missing: give {instead}")
    header = read_json(file, CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} must hold a mapping, got {type(header).__name__}")
    return header


def answers(folder: Path) -> bool:
    """Whether a folder holds an understanding model: transformers' LLaVA over a tokenizer.

    Raises:
        CheckpointError: a ``config.json`` that cannot be read.
    """
    return _kinds(folder)[:2] == ("llava", "tokenflow_vision")


def answers_and_draws(folder: Path) -> bool:
    """Whether it holds one whose language model is that of text to image; as :func:`answers`."""
    return _kinds(folder) == ("llava", "tokenflow_vision", "tokenflow_text")


def _kinds(folder: Path) -> tuple[Any, Any, Any]:
    """The ``model_type`` of the whole, of its vision model and of its language model."""
    file = folder / HEADER
    header = read_json(file, CheckpointError) if file.exists() else None

    def kind(part: Any) -> Any:
        return part.get("model_type") if isinstance(part, dict) else None

    known = header if isinstance(header, dict) else {}
    return kind(known), kind(known.get("vision_config")), kind(known.get("text_config"))


def first_line(error: Exception) -> str:
    """What an error of transformers says at first.

    What follows is advice to run the code of the files, or to go to the network.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return "it asks for code of its own, which is not run"
    if isinstance(error, KeyError):
        return f"it has no {brief(error)}"
    if "weights_only" in text:
        return brief(error)
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return brief(" ".join(lines[: 2 if lines[0].rstrip().endswith(":") else 1]))


def write(
    folder: str | Path,
    state: Mapping[str, Tensor],
    header: Mapping[str, Any],
    shard: str,
    overwrite: bool,
) -> Path:
    """Saves a folder as :func:`.read_state_dict` and transformers read it. ``config.json`` comes
    last, and each file is complete before it takes its name.

    Args:
        shard: the largest file, such as ``5GB``; what does not fit into one goes into several.
        overwrite: whether to replace a model that is there.

    Raises:
        OutputError: a model is there, or a place that cannot be written to, or a full disk.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    folder = Path(folder)
    old = [file for name in (HEADER, "model*.safetensors*") for file in folder.glob(name)]
    if old and not overwrite:
        raise OutputError(f"{old[0]} is there already: nothing is written over it")
    content = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            save_torch_state_dict(content, partial, max_shard_size=shard)
            text = json.dumps(dict(header), indent=2) + "\n"
            (Path(partial) / HEADER).write_text(text, encoding="utf-8")
            for file in old:  # of an earlier model, in other shards
                file.unlink()
            for file in sorted(Path(partial).iterdir(), key=_weights_index_header):
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    return folder


def _weights_index_header(file: Path) -> tuple[bool, bool]:
    return file.suffix == ".json", file.name == HEADER
