"""A run's folder: who writes into it, and what a resumed run may change."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenflow_ext.models import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.config import to_plain
from tokenflow_ext.models.serialization.files import (
    OutputError,
    brief,
    cannot_write,
    remove_parts,
    shown,
)
from tokenflow_ext.train.config import (
    DecoderConfig,
    TextConfig,
    TrainConfig,
    UnderstandingConfig,
    VarTrainConfig,
    from_yaml,
    leaves,
)

from . import checkpoint

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
#: What a run writes besides, anew or line by line.
OUTPUTS = ("log.jsonl", "summary.json", "pictures", "tensorboard")

Config = TrainConfig | DecoderConfig | TextConfig | UnderstandingConfig | VarTrainConfig

# -- one writer -----------------------------------------------------------------------------------

_held: set[int] = set()


def _let_go() -> None:
    """A forked process (one that reads data) has the lock's handle too, and may outlive the run."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Be the only process that writes into the run's folder, which is made where there is none.

    The system lets go of the lock when the process ends, however it ends.

    Raises:
        CheckpointError: another process has it.
        OutputError: the folder cannot be made, or locked.
    """
    file = run / LOCK_FILE
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write into {run}: {brief(error)}") from error
    try:
        _claim(handle, file)
        _held.add(handle)
        remove_parts(run)
        checkpoint.tidy(run / "checkpoints")
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def _claim(handle: int, file: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError:
        holder = " ".join(os.pread(handle, 200, 0).decode("utf-8", "replace").split())
        raise CheckpointError(
            f"another process trains in {file.parent} ({holder or 'unknown'}): wait for it, end "
            "it, or choose another folder with run=FOLDER"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OutputError(f"cannot lock {file}: {brief(error)}") from error
        print(f"{file}: {brief(error)}: nothing keeps another run out of the folder", flush=True)


# -- what a resumed run may change ----------------------------------------------------------------

_VAR_SHAPE = (
    "depth",
    "width",
    "heads",
    "mlp_ratio",
    "classes",
    "shared_adaln",
    "l2_attention",
)
#: Keys (and all below them) that a run keeps from its first step to its last, and why.
FIXED = {
    "seed": "it decides which sample comes when",
    "preset": "the model is what it is",
    "resolution": "the model is what it is",
    "decoder": "the model is what it is",
    "pretrained_tower": "it decided what the run started from",
    "model.image_size": "the model is what it is",
    "model.pixel": "the model is what it is",
    "model.semantic": "the model is what it is",
    "model.quantizer": "the model is what it is",
    "model.teacher": "the decoder's width is the teacher's",
    "model.backbone": "the model is what it is",
    **{f"model.{key}": "the model is what it is" for key in _VAR_SHAPE},
    "model.vocabulary": "the model is what it is",
    "model.prompt_length": "the model is what it is",
    "model.features": "the model is what it is",
    "model.window": "the model is what it is",
    "model.tokenizer_dtype": "the model is what it is",
    "model.trained": "the optimizer has no state for a part that was frozen",
    "model.lora": "the model is what it is",
    "data.group_by_length": "it decides which sample comes when",
    "data.streams": "it decides which sample comes when",
    "codebook.kmeans_batches": "k-means has run",
    "codebook.kmeans_iterations": "k-means has run",
}
#: Where something is that the run started from: it may have moved, but not come or gone.
PLACES = ("init", "tokenizer", "backbone", "language_model")


def _refusal(key: str, old: Any, new: Any, before: dict[str, Any]) -> str | None:
    """Why a resumed run cannot change ``key`` from ``old`` to ``new``; None where it can."""
    for fixed, why in FIXED.items():
        if key == fixed or key.startswith(f"{fixed}."):
            return why
    if key in PLACES and None in (old, new):
        return "it decided what the run started from"
    if key in ("optim.batch", "optim.accumulate") and before.get("data.streams") != [1, 1]:
        return "with data.streams it decides which sample comes when"
    if key.startswith("optim.lr_scale.") and 0 in (old, new):
        return "the optimizer has no state for a part that was frozen"
    if key == "optim.ema_decay" and "tokenizer" in before and 0 in (old, new):
        return "it decides whether there is an average of the weights"
    shape = ("loss.discriminator", "loss.discriminator_channels")
    if key in shape and before.get("loss.gan", 0) > 0:
        return "the discriminator is what it is"
    return None


def changes(path: Path, saved: str, config: Config) -> list[str]:
    """What a run changes that is continued from the checkpoint at ``path``, a line a key. Every
    one of them takes effect.

    Args:
        saved: the configuration of the checkpoint, as YAML.

    Raises:
        ConfigError: keys that cannot change; the message names all of them.
    """
    after = leaves(to_plain(config))
    # A checkpoint of an earlier release lacks keys that have their default.
    before = leaves(to_plain(type(config)())) | from_yaml(saved, f"the configuration in {path}")
    found, refused = [], []
    for key, new in after.items():
        old = before.get(key)
        if key == "run" or old == new:
            continue
        change = f"{key}: {shown(old)} -> {shown(new)}"
        why = _refusal(key, old, new, before)
        if why is None:
            found.append(change)
        else:
            refused.append(f"{change} ({why})")
    if refused:
        raise ConfigError(f"{path} cannot be continued with {'; '.join(refused)}")
    return found


def begin(config: Config, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and lines on that for people.

    Raises:
        CheckpointError: a run is in the folder already, and ``resume`` is false; or no run, but
            something that a run would write over.
        ConfigError: see :func:`changes`.
    """
    run = Path(config.run)
    existing = checkpoint.available(run / "checkpoints")
    begun = (run / CONFIG_FILE).exists()
    if (existing or begun) and not resume:
        raise CheckpointError(
            f"{run} already holds a run: continue it with --resume, or choose another folder "
            "with run=FOLDER"
        )
    if not (existing or begun):
        for name in OUTPUTS:
            place = run / name
            if os.path.lexists(place) and not _is_empty_folder(place):
                raise CheckpointError(
                    f"{place} is no run's, and a run would write over it: choose another folder "
                    "with run=FOLDER"
                )
    if not existing:
        what = "no checkpoint yet" if begun else "no run"
        said = f"--resume: {run} holds {what} to continue: the training starts from its first step"
        return None, [said] if resume else []
    newest = existing[-1]
    lines = changes(newest, checkpoint.saved_config(newest), config)
    return newest, [f"the resumed run changes {line}" for line in lines]


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def settle(run: Path, config: str) -> None:
    """Write down what the run does from now on, once nothing of it can be refused any more.

    Raises:
        OutputError: the folder cannot be written to.
    """
    try:
        (run / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(run / "checkpoints", error) from error
    checkpoint.write_text(run / CONFIG_FILE, config)
