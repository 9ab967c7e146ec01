"""Saved models to the hub: the files of ``save_pretrained`` and a model card, in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .config import CheckpointError, ConfigError
from .files import OutputError, brief, shown
from .hub import api, is_hub_id, package, patience
from .pretrained import CONFIG_FILE, WEIGHTS_FILE
from .state_dict import INDEX, listed

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelInfo

LIBRARY = "tokenflow_ext"
CARD_FILE = "README.md"
# What save_pretrained writes weights to, here and in transformers.
_WEIGHTS = (WEIGHTS_FILE, WEIGHTS_FILE + INDEX, "model-?????-of-?????.safetensors")
_MARK = "<!-- Written by push_to_hub of tokenflow_ext. Without this line it is left as it is. -->"

Figures = Mapping[str, float | int | str]


@dataclass(frozen=True)
class Card:
    """What a model card says of a kind of model.

    Attributes:
        kind: what it is, in a few words.
        tags: the hub's, besides the library's name.
        usage: a program that loads and uses it, with ``REPOSITORY`` in the place of its hub id.
        pipeline: the hub's task, where it has one for it.
    """

    kind: str
    tags: tuple[str, ...]
    usage: str
    pipeline: str | None = None


class PushOptions(TypedDict, total=False):
    """How a model is pushed: keyword arguments of every ``push_to_hub``.

    Attributes:
        license: the hub's name of the licence of the weights, for the card.
        metrics: figures by name, for the card.
        private: whether a new repository is private; None is the organisation's default.
        token: of an account that may write; None is the stored one.
        revision: the branch, which is made where there is none [main].
        commit_message: None says what it is.
        create_pr: whether to open a pull request rather than write to the branch.
        overwrite_card: whether to replace a card that ``push_to_hub`` did not write. Without it
            such a card is left, and a line says so.
    """

    license: str | None
    metrics: Figures | None
    private: bool | None
    token: str | bool | None
    revision: str | None
    commit_message: str | None
    create_pr: bool
    overwrite_card: bool


def push(
    save: Callable[[Path], object],
    is_own: Callable[[Path], bool],
    card: Card,
    config: Mapping[str, Any],
    repo_id: str,
    *,
    license: str | None = None,
    metrics: Figures | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Saves a model to the hub; see ``push_to_hub`` of the models, and :class:`PushOptions`.

    Args:
        save: writes the model into a folder.
        is_own: whether a folder's ``config.json`` is that of such a model.
        card: what its card says.
        config: as it is saved, for the card.
    """
    if not is_hub_id(repo_id):
        raise ConfigError(f"repo_id must be ORGANISATION/NAME, got {shown(repo_id)}")
    from_hub = package()
    client = api(token)

    def ask(at: str | None) -> ModelInfo:
        return client.model_info(repo_id, revision=at, timeout=patience())

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        text = write_card(card, config, repo_id, license, metrics)
        try:
            try:
                ask(None)
            except from_hub.errors.RepositoryNotFoundError:
                client.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                client.create_branch(repo_id, branch=revision, exist_ok=True)
            found = ask(revision)
            names = {each.rfilename for each in found.siblings or []}
            there = {
                name: Path(
                    client.hf_hub_download(
                        repo_id, name, revision=found.sha, cache_dir=Path(temporary) / "cache"
                    )
                )
                for name in (CONFIG_FILE, CARD_FILE)
                if name in names
            }
            written = [path for path in folder.rglob("*") if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path for path in written}
            _check_own(is_own, there, names & files.keys(), repo_id)
            if CARD_FILE in there and not overwrite_card and _MARK not in _text(there[CARD_FILE]):
                print(
                    f"left {CARD_FILE} of {repo_id}, which push_to_hub did not write: "
                    "overwrite_card=True replaces it",
                    flush=True,
                )
            else:
                files[CARD_FILE] = folder / CARD_FILE
                files[CARD_FILE].write_text(text, encoding="utf-8")
            # Of an earlier save in other files: one of them might be read in the place of these.
            old = sorted(n for n in names - files.keys() if any(fnmatch(n, p) for p in _WEIGHTS))
            changes = [from_hub.CommitOperationAdd(*each) for each in sorted(files.items())]
            made: CommitInfo = client.create_commit(
                repo_id,
                [*changes, *map(from_hub.CommitOperationDelete, old)],
                commit_message=commit_message or f"Upload {card.kind}",
                revision=revision,
                create_pr=create_pr,
                parent_commit=found.sha,  # what has been looked at: refused where another came
            )
            if old:
                print(f"removed {listed(old)} of an earlier model from {repo_id}", flush=True)
            return made
        except OutputError:
            raise
        except Exception as error:  # of many types; each means the same to the user
            raise OutputError(
                f"cannot write to the repository {repo_id}: {brief(error)}"
            ) from error


def _check_own(
    is_own: Callable[[Path], bool], there: dict[str, Path], taken: set[str], repo_id: str
) -> None:
    """That the files of these names in the repository are an earlier save's.

    Raises:
        OutputError: they are not.
    """
    try:
        own = is_own(there[CONFIG_FILE].parent) if CONFIG_FILE in there else not taken
    except CheckpointError:
        own = False
    if not own:
        name = CONFIG_FILE if CONFIG_FILE in there else min(taken)
        raise OutputError(
            f"the repository {repo_id} holds another model ({name}): nothing is written over it"
        )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def write_card(
    card: Card,
    config: Mapping[str, Any],
    repo_id: str,
    license: str | None = None,
    metrics: Figures | None = None,
) -> str:
    """A model card: metadata for the hub, how to use the model, figures, configuration, licence.

    Args:
        license: the hub's name of it; None says that none is given.
        metrics: figures by name, as they are to be shown.
    """
    from_hub = package()
    data = from_hub.ModelCardData(
        library_name=LIBRARY,
        license=license,
        tags=[LIBRARY, *card.tags],
        pipeline_tag=card.pipeline,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        _MARK,
        f"# {repo_id.partition('/')[2]}",
        f"{card.kind[0].upper()}{card.kind[1:]}, by the library `{LIBRARY}`.",
        f"## How to use\n\n```py\n{card.usage.replace('REPOSITORY', repo_id).strip()}\n```",
    ]
    if metrics:
        parts.append("## Figures\n\n" + _table("figure", "value", metrics))
    parts.append("## Configuration\n\n" + _table("field", "value", _flat(config)))
    parts.append(
        "## Licence\n\n"
        + ("None is given by whoever uploaded this." if license is None else f"`{license}`")
    )
    return str(from_hub.ModelCard("\n\n".join(parts) + "\n"))


def _table(first: str, second: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {first} | {second} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{path}.")
        elif isinstance(value, (list, tuple)):
            found[path] = ", ".join(map(str, value))
        else:
            found[path] = value
    return found
