"""Models on the hub: what a path or a hub id means, fetched through huggingface_hub.

A hub id is ``ORGANISATION/NAME``. What is there on the disk under that name comes first. Files go
to huggingface_hub's cache, so that the second load needs no download, nor a network with
``local_files_only``. The server is that of the environment's ``HF_ENDPOINT``, as huggingface_hub's.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenflow_ext.errors import MissingPackageError

from .config import CheckpointError, ConfigError
from .files import brief, shown
from .pretrained import CONFIG_FILE
from .state_dict import INDEX, WEIGHTS_FILES, indexed, listed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PART = "[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_ID = re.compile(f"{_PART}/{_PART}")
_LONGEST_ID = 96
#: Files of weights on their own.
SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")
_FILES = (*SUFFIXES, ".json", ".yaml", ".gguf")
#: What else transformers reads in a folder of its own: a text tokenizer, a processor, how to
#: generate.
TRANSFORMERS_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class Hub:
    """Where and how a hub id is looked up; each is None, or False, unless it is given.

    Attributes:
        filename: the file of weights, or the index of several, in the repository.
        revision: a branch, a tag or a commit [main].
        cache_dir: where files are kept [huggingface_hub's].
        token: of a private or gated repository; True is the one that is stored.
        local_files_only: take what is in the cache, and ask no server.
    """

    filename: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def given(self) -> list[str]:
        """The names of what is given."""
        names = ("filename", "revision", "cache_dir", "token")
        found = [name for name in names if getattr(self, name) is not None]
        return [*found, "local_files_only"] if self.local_files_only else found

    def refuse(self, source: str) -> None:
        """That nothing is given, where ``source`` is no hub id.

        Raises:
            ConfigError: something is.
        """
        if given := self.given():
            raise ConfigError(
                f"{given[0]} is for models on the hub, not for {source}: leave {', '.join(given)} "
                "out"
            )


def is_hub_id(source: str | Path) -> bool:
    """Whether ``source`` is written as a hub id: text, two names with a slash between, the second
    of which does not end as a file of weights does."""
    if not isinstance(source, str) or not _ID.fullmatch(source) or len(source) > _LONGEST_ID:
        return False
    return ".." not in source and "--" not in source and not source.endswith(_FILES)


def resolve(
    source: str | Path,
    hub: Hub,
    *,
    parts: Sequence[str] = (),
    files: Sequence[str] = (),
    beside: Sequence[str] = (),
    check: Callable[[Path], object] | None = None,
) -> Path:
    """The local file or folder that a path or a hub id means.

    A repository with a ``config.json`` is a folder. Of it the header and the weights are fetched,
    in the one form that is read. In any other the only file of weights is taken, or
    ``hub.filename``.

    Args:
        source: a path, which comes first where something is there, or a hub id.
        hub: how to look up the latter.
        parts: folders in the repository that have a header and weights as well, where they are
            there.
        files: others that are fetched with a folder, where they are there.
        beside: those that are fetched with a single file, from its folder, where they are there.
        check: is given a folder that has nothing but ``config.json`` yet, and may refuse it before
            weights are fetched.

    Returns:
        A path as it was given, whether something is there or not; or one in the cache.

    Raises:
        ConfigError: arguments of the hub beside a path.
        CheckpointError: no such repository, revision or file, several files to choose from, no
            permission, or no server; the message says what was tried.
        MissingPackageError: huggingface_hub is not installed.
    """
    if os.path.lexists(source) or not is_hub_id(source):
        there = os.path.lexists(source)
        hub.refuse(f"{source}, which is {'on the disk' if there else 'no hub id (ORG/NAME)'}")
        return Path(source)
    repository = _Repository(str(source), hub)
    if hub.filename is not None:
        return repository.file(hub.filename, beside)
    names = repository.names
    if names is None or CONFIG_FILE in names:
        folder = repository.fetch([CONFIG_FILE])
        if names is None:
            names = _cached(folder)
        if CONFIG_FILE in names:
            if check is not None:
                check(folder)
            return repository.folder(names, parts, files)
    found = [name for name in names if name.endswith(SUFFIXES)]
    if len(found) == 1:
        return repository.file(found[0], beside)
    if not found:
        raise CheckpointError(
            f"{repository} has neither {CONFIG_FILE} nor a file of weights "
            f"({', '.join(SUFFIXES)}); it has {listed(names) or 'no files'}"
        )
    raise CheckpointError(
        f"{repository} has {len(found)} files of weights: say which by filename, one of "
        f"{listed(found)}"
    )


class _Repository:
    """A repository on the hub, at a revision.

    Attributes:
        names: of the files in it; None where no server is asked, or none answers.
    """

    def __init__(self, name: str, hub: Hub) -> None:
        self.name, self.hub = name, hub
        self.failure: Exception | None = None
        self.names = None if hub.local_files_only else self._ask()

    def __str__(self) -> str:
        at = "" if self.hub.revision is None else f" at {self.hub.revision}"
        return f"the repository {self.name}{at}"

    def _ask(self) -> list[str] | None:
        client = api(self.hub.token)
        from huggingface_hub import errors  # after what says how to get it

        try:
            found = client.model_info(self.name, revision=self.hub.revision, timeout=patience())
        except errors.RevisionNotFoundError as error:
            self._refuse(error)
        except Exception as error:  # of many types: the cache may have it all the same
            self.failure = error
            return None
        return sorted(each.rfilename for each in found.siblings or [])

    def fetch(self, names: Sequence[str]) -> Path:
        """The folder of the revision in the cache, with the files of these names that are in the
        repository. Of a server that did not answer nothing is asked again."""
        hub = self.hub
        try:
            return Path(
                package().snapshot_download(
                    self.name,
                    revision=hub.revision,
                    cache_dir=hub.cache_dir,
                    token=hub.token,
                    local_files_only=self.names is None,
                    allow_patterns=[glob.escape(name) for name in names],
                    endpoint=endpoint(),
                )
            )
        except Exception as error:
            self._refuse(error)

    def _with_indexed(self, names: Sequence[str]) -> Path:
        """As :meth:`fetch`, with the files that indexes among ``names`` name too."""
        folder = self.fetch(names)
        indexes = [folder / n for n in names if n.endswith(INDEX) and (folder / n).is_file()]
        if not indexes:
            return folder
        more = {part for index in indexes for part in indexed(index).values()}
        return self.fetch([*names, *sorted(part.relative_to(folder).as_posix() for part in more)])

    def folder(self, names: Sequence[str], parts: Sequence[str], files: Sequence[str]) -> Path:
        """The folder with the header and the weights at its top and in ``parts``, and ``files``.

        Args:
            names: of what is in the repository.
        """
        wanted = list(files)
        for start in ("", *(f"{part}/" for part in parts)):
            weights = [start + name for name in WEIGHTS_FILES if start + name in names]
            wanted += [start + CONFIG_FILE, *weights[:1]]
            if self.names is None and not weights and start + CONFIG_FILE in names:
                raise CheckpointError(self._not_cached())
        return self._with_indexed(wanted)

    def file(self, name: str, beside: Sequence[str]) -> Path:
        """A file, and those of its folder that are read with it."""
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
            if self.hub.filename is None:
                raise CheckpointError(f"{self} has a file {shown(name)}, which is not below it")
            raise ConfigError(f"filename must name a file in {self}, got {shown(name)}")
        if self.names is not None and name not in self.names:
            raise CheckpointError(
                f"{self} has no file {name}; it has {listed(self.names) or 'no files'}"
            )
        start = name[: name.rfind("/") + 1]
        path = self._with_indexed([name, *(start + other for other in beside)]) / name
        if not path.is_file():
            raise CheckpointError(self._not_cached())
        return path

    def _not_cached(self) -> str:
        """That what is wanted is not in the cache, and why no server gave it."""
        said = (
            f"nothing at {self.name} on the disk, and the cache "
            f"({self.hub.cache_dir or 'of huggingface_hub'}) has not "
            f"{self.hub.filename or 'all that is read'} of {self}; "
        )
        if self.failure is None:
            return f"{said}local_files_only asks no server"
        why = brief(self.failure, 120)
        return (
            f"{said}{endpoint() or 'the hub'} cannot be reached ({why}). Put the files into a "
            "folder, and give its path"
        )

    def _refuse(self, error: Exception) -> NoReturn:
        """The error of huggingface_hub in words of ours."""
        from huggingface_hub import errors

        server = endpoint() or "the hub"
        access = (
            "give the token of an account that may"
            if self.hub.token in (None, False)
            else "the token that was given does not do"
        )
        missing = isinstance(error, errors.LocalEntryNotFoundError)
        if missing and self.failure is not None:
            error = self.failure
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
        if isinstance(error, errors.GatedRepoError):
            said = f"{self} is gated: ask for access on its page, and {access}"
        elif isinstance(error, errors.RevisionNotFoundError):
            said = f"the repository {self.name} has no revision {self.hub.revision or 'main'}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            said = (
                f"nothing at {self.name} on the disk, and {server} has no such repository, or a "
                f"private one ({access})"
            )
        elif status in (401, 403):
            said = f"{server} answers {status} for {self}: {access}"
        elif missing:
            said = self._not_cached()
        elif status:
            said = f"{server} answers {status} for {self}"
        else:
            said = f"{self} cannot be fetched from {server}: {brief(error)}"
        raise CheckpointError(said) from error


def _cached(folder: Path) -> list[str]:
    """The files of a repository that the cache has."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def patience() -> float:
    """How many seconds a server may take to say what it has: ``HF_HUB_ETAG_TIMEOUT`` of the
    environment, as for huggingface_hub's own questions."""
    return float(package().constants.HF_HUB_ETAG_TIMEOUT)


def endpoint() -> str | None:
    """The hub's server as the environment has it now (huggingface_hub looks once, when it is
    imported); None is its own."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def package() -> Any:
    """huggingface_hub.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackageError(
            "models on the hub need huggingface_hub: pip install 'tokenflow_ext[models]'"
        ) from error
    return huggingface_hub


def api(token: str | bool | None) -> HfApi:
    """huggingface_hub's client of the server that :func:`endpoint` names.

    Raises:
        MissingPackageError: it is not installed.
    """
    return package().HfApi(endpoint=endpoint(), token=token)
