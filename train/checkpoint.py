"""Checkpoints: folders that appear whole or not at all, and are loaded without unpickling code.

    RUN/checkpoints/step_00000300/
        config.json, model.safetensors   the EMA weights, as ``save_pretrained`` writes them
                                         (text-to-image: with ``tokenizer/``, ``text_tokenizer/``)
        training.pt                      everything else, read with ``weights_only=True``
        manifest.json                    format, step, and size and SHA-256 of each file

A checkpoint is written to a folder with a temporary name, every file is flushed to the disk, and
the folder is renamed. A process killed at any moment leaves the finished checkpoints as they were.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenflow_ext.models import CheckpointError, ConfigError, TokenFlowTokenizer
from tokenflow_ext.models.saved import CONFIG_FILE, WEIGHTS_FILE
from tokenflow_ext.train.outputs import write_file

FORMAT = "tokenflow-training-checkpoint"
VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")


def _flush(path: Path) -> None:
    """Ask the system to write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file of the run's own, in the place of an earlier one; see
    :func:`outputs.write_file`."""
    write_file(path, text.encode("utf-8", "backslashreplace"), overwrite=True)


def available(folder: Path) -> list[Path]:
    """The finished checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    named = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(named)]


def save(
    folder: Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], keep: int
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and delete all but the newest ``keep``.

    Args:
        state: tensors, numbers, strings and containers of them.
        save_model: writes the weights for use (config.json, model.safetensors) into a folder.

    Returns:
        The folder of the checkpoint.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".writing_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".writing_*"):  # of a process that was killed
        shutil.rmtree(left_over)
    temporary.mkdir()
    save_model(temporary)
    torch.save(state, temporary / "training.pt")
    files = {}
    for path in sorted(temporary.rglob("*")):
        _flush(path)
        if path.is_file():
            name = path.relative_to(temporary).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    write_text(temporary / "manifest.json", json.dumps(manifest, indent=2))
    _flush(temporary)
    if final.exists():  # a run continued from an earlier checkpoint comes by again
        shutil.rmtree(final)
    temporary.rename(final)
    _flush(folder)
    for old in available(folder)[:-keep]:
        # Renamed first, so that a kill half-way through leaves no half of a checkpoint in sight.
        doomed = old.with_name(f".writing_{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed)
    return final


def verify(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path`` once every file agrees with it.

    Raises:
        CheckpointError: saying what is wrong with which file.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is no training checkpoint: it has no manifest.json"
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}/manifest.json cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training checkpoint of this project")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {manifest.get('version')}; this release reads version {VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or "training.pt" not in files:
        raise CheckpointError(f"{path}/manifest.json names no files of a checkpoint")
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if (size := file.stat().st_size) != facts["bytes"]:
            raise CheckpointError(
                f"{file} is truncated or altered: {size} bytes, expected {facts['bytes']}"
            )
        if digest(file) != facts["sha256"]:
            raise CheckpointError(f"{file} is altered: its SHA-256 is not the one in manifest.json")
    return manifest


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state that ``save`` was given, from a checkpoint that is whole.

    Raises:
        CheckpointError: see ``verify``; also for content other than tensors and plain containers.
    """
    verify(path)
    try:
        return torch.load(path / "training.pt", map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path / 'training.pt'} cannot be loaded: {error}") from error


def check_there(path: str | Path) -> Path:
    """That there is anything at all at ``path``.

    Raises:
        CheckpointError: there is not.
    """
    given = Path(path)
    if not given.exists():
        raise CheckpointError(f"nothing at {given}")
    return given


def find(path: str | Path) -> Path:
    """The folder with config.json and model.safetensors that ``path`` means.

    ``path`` is a run (its newest checkpoint is taken), a checkpoint, or a save_pretrained folder.

    Raises:
        CheckpointError: nothing there, or a checkpoint that is not whole.
    """
    given = check_there(path)
    if given.is_file():
        given = given.parent
    if checkpoints := available(given / "checkpoints") or available(given):
        given = checkpoints[-1]
    if (given / "manifest.json").exists():
        verify(given)
    elif not ((given / CONFIG_FILE).is_file() and (given / WEIGHTS_FILE).is_file()):
        raise CheckpointError(
            f"{given} is neither a run with a checkpoint, nor a checkpoint, nor a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return given


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer that ``path`` means: what :func:`find` finds, or a released file.

    Raises:
        CheckpointError: nothing there, or a checkpoint that is not whole.
    """
    given = Path(path)
    # Beside a config.json a file is a part of a folder.
    alone = given.is_file() and not (given.parent / CONFIG_FILE).is_file()
    return given if alone else find(given)


def load_tokenizer(
    path: str | Path, resolution: int | None = None
) -> tuple[TokenFlowTokenizer, Path]:
    """The tokenizer at what :func:`find_tokenizer` finds, and what that is.

    Args:
        resolution: see :meth:`TokenFlowTokenizer.from_pretrained`.

    Raises:
        CheckpointError: nothing there, not whole, or no tokenizer.
        ConfigError: a resolution that the tokenizer was not made for.
    """
    place = find_tokenizer(path)
    try:
        return TokenFlowTokenizer.from_pretrained(place, resolution), place
    except ValueError as error:
        raise ConfigError(str(error)) from error


def tokenizer_digest(place: Path) -> str:
    """SHA-256 of the weights of what :func:`find_tokenizer` found."""
    return digest(place if place.is_file() else place / WEIGHTS_FILE)


def add_tokenizer_arguments(
    parser: argparse.ArgumentParser, several: bool = False, more: str = ""
) -> None:
    """``--checkpoint`` and ``--resolution`` of a command that uses tokenizers.

    Args:
        several: ``--checkpoint`` may be repeated, and is a list.
        more: what its help says at the end.
    """
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append" if several else "store",
        metavar="PATH",
        help=f"a run, a checkpoint, a folder of save_pretrained, or a released file{more}",
    )
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="of a released B: 224 or 256 [224]"
    )
