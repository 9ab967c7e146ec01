"""WebDataset shards (``*.tar``): which sample of a run is which of a shard, and reading it.

Sample ``g`` depends on nothing but (seed, g) and the size of a batch: the position of a run in its
shards is one integer, for any number of processes and workers.
"""

from __future__ import annotations

import bisect
import json
import math
import tarfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokenflow_ext.train import data
from tokenflow_ext.train.data import DataError, Picture, counted_rng
from tokenflow_ext.train.pictures import BrokenImageError, open_image, suffixes

_SPARES = 8  # samples of a shard that are tried in the place of a broken one


class Member(NamedTuple):
    """Where one sample lies in a tar file: (offset, size) of its picture and its description."""

    name: str
    picture: tuple[int, int]
    txt: tuple[int, int] | None
    json: tuple[int, int] | None


@dataclass
class _Round:
    """One round of a stream: its shards in order (their places in the stream), for each the number
    that decides whether a fraction of a sample counts, and where each ends as far as is known."""

    shards: list[int]
    luck: list[float]
    ends: list[int] = field(default_factory=list)


def read_members(path: Path) -> list[Member]:
    """The samples of a WebDataset shard: members of one name up to the first dot of the file.

    Only headers are read. A name without a picture is left out.

    Raises:
        DataError: not an uncompressed tar file, or a truncated one.
    """
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    names: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                suffix = suffix.lower()
                kind = "picture" if f".{suffix}" in suffixes() else suffix
                key = f"{folder}/{stem}"
                groups.setdefault(key, {})[kind] = (member.offset_data, member.size)
                if kind == "picture":
                    names[key] = member.name
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot read the shard {path}: {error}") from error
    return [
        Member(names[key], parts["picture"], parts.get("txt"), parts.get("json"))
        for key, parts in groups.items()
        if "picture" in parts
    ]


def list_shards(folder: Path) -> list[Path]:
    """The shards in a folder by name; none where it holds something else.

    Raises:
        DataError: compressed shards.
    """
    found = sorted(folder.glob("*.tar"))
    if not found and (any(folder.glob("*.tar.*")) or any(folder.glob("*.tgz"))):
        raise DataError(f"{folder} holds compressed shards: decompress them, pictures are anyway")
    return found


class Shards:
    """Shards dealt out to ``streams``.

    With ``streams = (A, B)`` the shards are cut into A * B parts, and each part is read by one
    stream, shard after shard. The joint batch of number n takes its A equal parts from the streams
    (0, n mod B) ... (A - 1, n mod B). Where the number of processes divides A and that of their
    workers divides B, a worker reads the shards of its own streams and no other's; the samples are
    the same where they do not.

    In each round of a stream its shards come in a new order, and so do the samples of a shard; with
    weights a sample comes w times a round on average, w rounded down or up in any one.

    A picture that cannot be decoded is replaced by another of its shard, picked by (seed, number of
    the sample): a crawl of the web has some, and a run must not end there. A shard that cannot be
    read is an error.

    Args:
        joint: samples that all processes take together for one micro-batch.
        described: whether samples without a ``.txt`` or ``.json`` are left out.
        weight_key: the key of a sample's weight in its ``.json`` (1 where it has none); "" is 1 for
            all. It is read when the shard is opened.

    Raises:
        DataError: streams that do not fit the batch or the number of shards.
    """

    def __init__(
        self,
        paths: list[Path],
        streams: tuple[int, int],
        joint: int,
        seed: int,
        *,
        described: bool = False,
        weight_key: str = "",
    ) -> None:
        across, along = streams
        if joint % across:
            raise DataError(
                f"data.streams = {list(streams)}: its first number must divide the {joint} samples "
                "that all processes take at once (optim.batch / optim.accumulate)"
            )
        if len(paths) < across * along:
            raise DataError(
                f"{paths[0].parent} holds {len(paths)} shards, too few for data.streams = "
                f"{list(streams)}"
            )
        self.paths, self.streams, self.joint, self.seed = paths, (across, along), joint, seed
        self.described, self.weight_key = described, weight_key
        self._parts = [paths[i :: across * along] for i in range(across * along)]  # of each stream
        self._sizes: dict[Path, float] = {}  # samples, or the sum of their weights
        self._unread = [set(part) for part in self._parts]
        self._starts = [[0] for _ in self._parts]  # samples of a stream before each of its rounds
        self._orders: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._opened: OrderedDict[Path, tuple[list[Member], np.ndarray | None]] = OrderedDict()

    @property
    def opened(self) -> set[Path]:
        """The shards that were opened so far."""
        return set(self._sizes)

    def describe(self) -> str:
        """How much there is, for people."""
        return f"{len(self.paths)} shards{' by weight' * bool(self.weight_key)}"

    # -- what is in a shard -----------------------------------------------------------------------

    def members(self, path: Path) -> list[Member]:
        """The shard's samples."""
        return self._open(path)[0]

    def _open(self, path: Path) -> tuple[list[Member], np.ndarray | None]:
        """The shard's samples and their weights; those of the shards used last stay in memory."""
        if path in self._opened:
            self._opened.move_to_end(path)
            return self._opened[path]
        members = read_members(path)
        if self.described:
            members = [m for m in members if m.txt is not None or m.json is not None]
        weights = None
        if self.weight_key:
            weights = np.array([self._weight(path, m) for m in members])
        self._sizes[path] = len(members) if weights is None else float(weights.sum())
        for part, unread in zip(self._parts, self._unread, strict=True):
            if unread == {path} and sum(self._sizes[p] for p in part) < 1:
                what = "with a caption" if self.described else "to train on"
                raise DataError(f"no picture {what} in {', '.join(map(str, part))}")
            unread.discard(path)
        self._opened[path] = (members, weights)
        while len(self._opened) > 2 * len(self._parts):
            self._opened.popitem(last=False)
        return members, weights

    def _weight(self, path: Path, member: Member) -> float:
        if member.json is None:
            return 1.0
        try:
            entry = json.loads(data.read_span(path, member.json))
            return data.checked_weight(entry.get(self.weight_key, 1.0))
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"data.weight_key={self.weight_key} of {path / member.name}: {error}"
            ) from error

    # -- which sample is which --------------------------------------------------------------------

    def place(self, index: int) -> tuple[Path, int]:
        """(shard, number of the sample in it) of sample ``index`` of the run."""
        across, along = self.streams
        batch, inside = divmod(index, self.joint)
        part, offset = divmod(inside, self.joint // across)
        turn, lane = divmod(batch, along)
        stream = part * along + lane
        number = turn * (self.joint // across) + offset  # of the sample in its stream
        paths, starts = self._parts[stream], self._starts[stream]
        while True:
            if not self._unread[stream]:
                while starts[-1] <= number:
                    starts.append(starts[-1] + self._walk(stream, len(starts) - 1).ends[-1])
            epoch = bisect.bisect_right(starts, number) - 1
            left = number - starts[epoch]
            # Shards are opened as the walk reaches them: the first round need not know them all.
            walked = self._walk(stream, epoch, left)
            place = bisect.bisect_right(walked.ends, left)
            if place < len(walked.ends):
                begin = walked.ends[place - 1] if place else 0
                which, visits = walked.shards[place], walked.ends[place] - begin
                order = self._order(stream, epoch * len(paths) + which, paths[which], visits)
                return paths[which], int(order[left - begin])

    def _walk(self, stream: int, epoch: int, number: int | None = None) -> _Round:
        """A round of a stream, walked as far as its sample ``number`` (None: to its end)."""
        paths, walked = self._parts[stream], self._round(stream, epoch)
        while len(walked.ends) < len(paths):
            end = walked.ends[-1] if walked.ends else 0
            if number is not None and number < end:
                break
            place = len(walked.ends)
            path = paths[walked.shards[place]]
            if path not in self._sizes:
                self._open(path)
            walked.ends.append(end + math.floor(self._sizes[path] + walked.luck[place]))
        return walked

    def _round(self, stream: int, epoch: int) -> _Round:
        def make() -> _Round:
            rng, count = counted_rng(self.seed, 4 + 2 * stream, epoch), len(self._parts[stream])
            return _Round(rng.permutation(count).tolist(), rng.random(count).tolist())

        return self._kept((4 + 2 * stream, epoch), make)

    def _order(self, stream: int, number: int, path: Path, visits: int) -> np.ndarray:
        """The order of a shard's samples in one round of its stream."""

        def make() -> np.ndarray:
            members, weights = self._open(path)
            rng = counted_rng(self.seed, 5 + 2 * stream, number)
            return data.draw_round(rng, len(members), weights, visits)

        return self._kept((5 + 2 * stream, number), make)

    def _kept(self, key: tuple[int, int], make: Any) -> Any:
        """What ``make`` makes; those asked for last are kept."""
        if key not in self._orders:
            self._orders[key] = make()
            while len(self._orders) > 4 * len(self._parts):
                self._orders.popitem(last=False)
        return self._orders[key]

    # -- reading ----------------------------------------------------------------------------------

    def at(self, index: int) -> Any:
        """Sample ``index`` of the run as :meth:`read` gives it, or what stands in for a broken one.

        Raises:
            DataError: naming the shard's member where those that were tried cannot be read either.
        """
        path, number = self.place(index)
        try:
            return self.read(path, number)
        except BrokenImageError as error:
            rng, count = counted_rng(self.seed, 2, index), len(self.members(path))
            for spare in rng.permutation(count)[:_SPARES].tolist():
                try:
                    return self.read(path, spare)
                except BrokenImageError:
                    continue
            tried = min(count, _SPARES)
            raise DataError(f"{error}; nor can {tried} others of its shard be read") from error

    def read(self, path: Path, number: int) -> Any:
        """The sample of that number in a shard: its image.

        Raises:
            DataError: naming shard and member.
        """
        member = self.members(path)[number]
        return open_image(path / member.name, data.read_span(path, member.picture))

    def regions(self, index: int) -> list[Image.Image]:
        """What sample ``index`` of the run may be cut from (see :class:`data.RandomCrops`)."""
        return [self.at(index)]


def first_pictures(paths: list[Path], count: int) -> list[Picture]:
    """The pictures of the first shards that hold ``count`` of them together."""
    found: list[Picture] = []
    for path in paths:
        found += [Picture(path, span=m.picture, member=m.name) for m in read_members(path)]
        if len(found) >= count:
            break
    return found
