"""Checkpoints: folders that appear whole or not at all, and are loaded without unpickling code.

    RUN/checkpoints/step_00000300/
        config.json, model.safetensors   the EMA weights, as ``save_pretrained`` writes them
                                         (text-to-image: with ``tokenizer/``, ``text_tokenizer/``)
        training.pt                      everything else, read with ``weights_only=True``
        manifest.json                    format, step, and size and SHA-256 of each file

A checkpoint is written to a folder with a temporary name, every file is flushed to the disk, and
the folder is renamed. A process killed at any moment leaves the finished checkpoints as they were.
What else lies in the folder is left alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tokenflow_ext.models.serialization.files as on_disk
from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import CheckpointError, ConfigError, TokenFlowTokenizer
from tokenflow_ext.models.serialization.files import (
    OutputError,
    brief,
    inside,
    read_json,
    shown,
    write_file,
)
from tokenflow_ext.models.serialization.hub import TRANSFORMERS_FILES, Hub, resolve
from tokenflow_ext.models.serialization.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_torch,
    write_torch,
)
from tokenflow_ext.models.serialization.state_dict import (
    WEIGHTS_FILES,
    weights_file,
    weights_files,
)
from tokenflow_ext.models.text_to_image.over_tokenizer import TEXT_FOLDER, TOKENIZER_FOLDER

FORMAT = "tokenflow-training-checkpoint"
VERSION = 1
STATE_FILE = "training.pt"
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"step_(\d{8,})")
# Being written; on its way out; to be put back where its replacement did not come.
_LEFT_OVER = re.compile(r"\.(writing|old|replaced)_(\d{8,})_[0-9a-f]{8}")
_TEXT_LIMIT = 1 << 20
# What a folder with a header and weights has.
_MODEL_FILES = (
    CONFIG_FILE,
    *WEIGHTS_FILES,
    "model-?????-of-?????.safetensors",
    "pytorch_model-?????-of-?????.bin",
)


def digest(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file of the run's own, in the place of an earlier one; see
    :func:`files.write_file`."""
    write_file(path, text.encode("utf-8", "backslashreplace"), overwrite=True)


def available(folder: Path) -> list[Path]:
    """The finished checkpoints in ``folder``, oldest first.

    Raises:
        OutputError: a folder that cannot be looked into.
    """
    if not folder.is_dir():
        return []
    try:
        named = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    except OSError as error:
        raise OutputError(f"{folder} cannot be read: {brief(error)}") from error
    return [path for _, path in sorted(named) if path.is_dir()]


def _beside(final: Path, kind: str) -> Path:
    """A new name for a folder beside the checkpoint ``final``."""
    return final.with_name(f".{kind}_{final.name.removeprefix('step_')}_{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    """Take a folder of ours out; of a link, the link."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:  # what is new has been written all the same
        print(f"left {path}, which cannot be removed: {brief(error)}", flush=True)


def tidy(folder: Path) -> None:
    """Take out what a killed process left in ``folder``, and nothing else; put back a checkpoint
    whose replacement did not come. For the process that writes there alone."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        found = _LEFT_OVER.fullmatch(path.name)
        if found is None or not path.is_dir():
            continue
        final = folder / f"step_{found[2]}"
        if found[1] == "replaced" and not final.exists():
            path.rename(final)
        else:
            _remove(path)


def save(
    folder: Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], keep: int
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and delete all but the newest ``keep``.

    Args:
        state: tensors, numbers, strings and containers of them.
        save_model: writes the weights for use (config.json, model.safetensors) into a folder.

    Returns:
        The folder of the checkpoint.

    Raises:
        OutputError: a full disk, no permission. The checkpoints that were there still are.
    """
    final = folder / f"step_{step:08d}"
    temporary = _beside(final, "writing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        temporary.mkdir()
        save_model(temporary)
        write_torch(temporary / STATE_FILE, state)
        files = {}
        for path in sorted(temporary.rglob("*")):
            on_disk.flush(path)
            if path.is_file():
                name = path.relative_to(temporary).as_posix()
                files[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
        write_text(temporary / MANIFEST_FILE, json.dumps(manifest, indent=2))
        on_disk.flush(temporary)
        replaced = None
        if final.is_symlink() or final.exists():  # a run from an earlier checkpoint comes by again
            replaced = _beside(final, "replaced")
            final.rename(replaced)
        temporary.rename(final)
        on_disk.flush(folder)
    except BaseException as error:
        if temporary.is_dir():
            _remove(temporary)
        if isinstance(error, (OSError, OutputError)):
            said = error if isinstance(error, OutputError) else on_disk.cannot_write(final, error)
            # The temporary name would mean nothing to people.
            raise OutputError(str(said).replace(temporary.name, final.name)) from error
        raise
    if replaced is not None:
        _remove(replaced)
    for old in available(folder)[:-keep]:
        # Renamed first, so that a kill half-way through leaves no half of a checkpoint in sight.
        doomed = _beside(old, "old")
        try:
            old.rename(doomed)
        except OSError as error:
            print(f"left {old}, which cannot be removed: {brief(error)}", flush=True)
        else:
            _remove(doomed)
    return final


def verify(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path`` once every file agrees with it.

    Raises:
        CheckpointError: saying what is wrong with which file.
    """
    file = path / MANIFEST_FILE
    if not file.exists():
        raise CheckpointError(f"{path} is no training checkpoint: it has no {MANIFEST_FILE}")
    manifest = read_json(file, CheckpointError, limit=_TEXT_LIMIT)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training checkpoint of this project")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {shown(manifest.get('version'))}; this release reads version "
            f"{VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE_FILE not in files:
        raise CheckpointError(f"{file} names no files of a checkpoint")
    for name, facts in files.items():
        part = inside(path, name, file, CheckpointError)
        if not isinstance(facts, dict):
            raise CheckpointError(
                f"{file} must give {name} a size and a SHA-256, got {shown(facts)}"
            )
        try:
            if not part.is_file():
                raise CheckpointError(f"{path} is incomplete: {name} is missing")
            size, sha = part.stat().st_size, None
            if size == facts.get("bytes"):
                sha = digest(part)
        except OSError as error:
            raise CheckpointError(
                f"{file}: {shown(name)} cannot be read: {error.strerror}"
            ) from error
        if sha is None:
            raise CheckpointError(
                f"{part} is truncated or altered: {size} bytes, expected "
                f"{shown(facts.get('bytes'))}"
            )
        if sha != facts.get("sha256"):
            raise CheckpointError(
                f"{part} is altered: its SHA-256 is not the one in {MANIFEST_FILE}"
            )
    return manifest


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state that ``save`` was given, from a checkpoint that is whole.

    Raises:
        CheckpointError: see ``verify``; also for content other than tensors and plain containers.
    """
    verify(path)
    file = path / STATE_FILE
    state = read_torch(file, CheckpointError, device=device)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} must hold a mapping, got {type(state).__name__}")
    return state


def saved_config(path: Path) -> str:
    """The configuration in the checkpoint at ``path``, as YAML; tensors are not read.

    Raises:
        CheckpointError: see :func:`load`.
    """
    try:
        state = read_torch(path / STATE_FILE, CheckpointError, mmap=True)
    except CheckpointError:
        verify(path)  # which may know better what is wrong
        raise
    if not isinstance(state, dict) or not isinstance(state.get("config"), str):
        raise CheckpointError(f"{path / STATE_FILE} has no configuration")
    return state["config"]


def check_there(path: str | Path, hub: Hub | None = None) -> Path:
    """What ``path`` means on this machine, where there is anything at all. What a hub id means is
    fetched.

    Args:
        hub: how to look up a hub id.

    Raises:
        CheckpointError: there is not.
        ConfigError: ``hub`` says something, and ``path`` is no hub id.
    """
    # The kind of model is not known yet.
    text = [f"{TEXT_FOLDER}/{name}" for name in TRANSFORMERS_FILES]
    given = resolve(
        path,
        hub or Hub(),
        parts=[TOKENIZER_FOLDER],
        files=[*TRANSFORMERS_FILES, *text],
        beside=[CONFIG_FILE],
    )
    try:
        given.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise CheckpointError(f"nothing at {given} ({brief(error)})") from error
    return given


def find(path: str | Path) -> Path:
    """The folder with config.json and model.safetensors that ``path`` means.

    ``path`` is a run (its newest checkpoint is taken), a checkpoint, a save_pretrained folder, or
    the hub id of one.

    Raises:
        CheckpointError: nothing there, or a checkpoint that is not whole.
    """
    given = check_there(path)
    if given.is_file():
        given = given.parent
    if checkpoints := available(given / "checkpoints") or available(given):
        given = checkpoints[-1]
    if (given / MANIFEST_FILE).exists():
        verify(given)
    elif not ((given / CONFIG_FILE).is_file() and weights_file(given).is_file()):
        raise CheckpointError(
            f"{given} is neither a run with a checkpoint, nor a checkpoint, nor a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return given


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer that ``path`` means: what :func:`find` finds, or an original checkpoint.

    Raises:
        CheckpointError: nothing there, or a checkpoint that is not whole.
    """
    given = check_there(path)
    return given if is_released(given) else find(given)


def is_released(path: str | Path) -> bool:
    """Whether ``path`` is a file of weights on its own: beside a config.json a file with the name
    of a part of a folder is that."""
    given = Path(path)
    if not given.is_file():
        return False
    parts = (*_MODEL_FILES, STATE_FILE, MANIFEST_FILE)
    part = any(fnmatch.fnmatch(given.name, name) for name in parts)
    return not (part and (given.parent / CONFIG_FILE).is_file())


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


def weights_digest(place: Path) -> str:
    """SHA-256 of the weights of what :func:`find` or :func:`find_tokenizer` found; of several files
    that of their SHA-256 in a row."""
    several = [digest(file) for file in weights_files(place)]
    if len(several) == 1:
        return several[0]
    return hashlib.sha256("".join(several).encode()).hexdigest()


__getattr__ = renamed(
    __name__, {"add_tokenizer_arguments": "tokenflow_ext.train.cli.options:add_tokenizer"}
)
