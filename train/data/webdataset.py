"""WebDataset shards (``*.tar``): which sample of a run is which of a shard, and reading it.

Sample ``g`` depends on nothing but (seed, g) and the size of a batch: the position of a run in its
shards is one integer, for any number of processes and workers.
"""

from __future__ import annotations

import bisect
import io
import math
import posixpath
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from PIL import Image

from . import crops
from .crops import Picture, counted_rng
from .image_files import BrokenImageError, find_images, open_image, suffixes
from .places import expand, is_file, is_folder, is_remote, names, open_place, parent, place, state
from .text_files import DataError, Tally, decode, parse_json, reason, require_file

_DESCRIPTIONS = (".txt", ".json", ".cls")
_SPARES = 8  # samples of a shard that are tried in the place of a broken one


class Member(NamedTuple):
    """Where one sample lies in a tar file: (offset, size) of its picture and its description."""

    name: str
    picture: tuple[int, int]
    txt: tuple[int, int] | None
    json: tuple[int, int] | None
    cls: tuple[int, int] | None = None
    caption: str = ""  # or a class, where those who want one have looked for it


@dataclass
class _Round:
    """One round of a stream: its shards in order (their places in the stream), for each the number
    that decides whether a fraction of a sample counts, and where each ends as far as is known."""

    shards: list[int]
    luck: list[float]
    ends: list[int] = field(default_factory=list)


class _Archive:
    """A file that never reads, nor allocates, more than it holds: a header may claim any size."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size = file, file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.tell())
        return self.file.read(left if size is None or size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _listing(path: Path, left: Tally) -> dict[str, tuple[int, int] | str]:
    """Where each file of an archive lies, (offset, size), or the name of the file it links to.

    Archives that were joined end to end are read as one.

    Raises:
        DataError: not an uncompressed tar file, or a truncated one.
    """
    found: dict[str, tuple[int, int] | str] = {}
    try:
        with (
            open_place(path) as opened,
            # Past zeros, where another archive may begin, and past what is no header.
            tarfile.open(
                fileobj=cast(IO[bytes], file := _Archive(opened)),
                mode="r:",
                ignore_zeros=True,
            ) as archive,
        ):
            end: int | None = 0  # of the member before, where that is known
            for member in archive:
                if member.size < 0 or member.offset < (end or 0):
                    raise ValueError(f"no sound header at byte {member.offset}")
                _check_gap(file, end, member.offset, path, left)
                name, end = posixpath.normpath(member.name), member.offset_data
                if member.issparse():
                    left.add("sparse files", f"{path}/{name}")
                    end = None
                elif member.isreg():
                    end += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if name in found:
                        left.add("files replaced by a later one of their name", f"{path}/{name}")
                    found[name] = (member.offset_data, member.size)
                elif member.islnk():
                    found[name] = posixpath.normpath(member.linkname)
                elif member.issym():
                    target = posixpath.join(posixpath.dirname(name), member.linkname)
                    found[name] = posixpath.normpath(target)
                elif not (member.isdir() or member.isdev()):
                    end = None
            _check_gap(file, end, file.size, path, left)
    except DataError:
        raise
    except Exception as error:  # tarfile lets many types through
        raise DataError(f"cannot read the shard {path}: {reason(error)}") from error
    return found


def _check_gap(file: _Archive, start: int | None, stop: int, path: Path, left: Tally) -> None:
    """Count what lies between two members and is neither zeros nor a header for all members.

    Raises:
        DataError: the file begins with it.
    """
    at = stop if start is None else start
    while at < stop:
        file.seek(at)
        block = file.read(min(1 << 20, stop - at))
        rest = block.lstrip(b"\0")
        at += (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if not rest:
            at = at if len(block) == 1 << 20 else stop
            continue
        file.seek(at)
        try:
            header = tarfile.TarInfo.frombuf(
                file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape"
            )
        except tarfile.HeaderError:
            header = None
        if header is None or header.type != b"g" or header.size < 0:
            if at == 0:
                raise DataError(
                    f"cannot read the shard {path}: no tar archive, or a compressed one"
                )
            left.add("stretches that are no tar", f"{path}, byte {at}")
            return
        at += (1 - (-header.size // tarfile.BLOCKSIZE)) * tarfile.BLOCKSIZE


def read_members(path: Path, left: Tally | None = None) -> list[Member]:
    """The samples of a WebDataset shard: members of one name up to the last dot of the file.

    Only headers are read. A link is the member it leads to. ``photo.v2.png`` is a sample of its
    own, but where there are ``photo.png`` and neither ``photo.v2.txt`` nor ``photo.v2.json`` (a
    mask, say): by WebDataset's rule, a name up to its first dot, it is a further part of that
    sample, and left out. With no ``photo.png``, ``photo.txt`` describes it too.

    Args:
        left: counts what is left out; None says it in a line.

    Raises:
        DataError: not an uncompressed tar file, or a truncated one.
    """
    told = Tally(path) if left is None else left
    files = _listing(path, told)
    pictures: dict[str, tuple[str, tuple[int, int]]] = {}
    described: dict[str, dict[str, tuple[int, int]]] = {}
    for name in files:
        key, suffix = posixpath.splitext(name)
        suffix = suffix.lower()
        if suffix not in suffixes() and suffix not in _DESCRIPTIONS:
            continue
        if posixpath.basename(name).startswith("."):  # macOS writes ._NAME beside each NAME
            told.add("hidden files", f"{path}/{name}")
            continue
        span: tuple[int, int] | str | None = files[name]
        seen = {name}
        while isinstance(span, str):
            following = None if span in seen else files.get(span)
            seen.add(span)
            span = following
        if span is None:
            told.add("links to what the shard does not hold", f"{path}/{name}")
        elif suffix in _DESCRIPTIONS:
            described.setdefault(key, {})[suffix] = span
        else:
            if key in pictures:
                told.add("pictures beside another of their name", f"{path}/{pictures[key][0]}")
            pictures[key] = (name, span)
    members = []
    for key, (name, span) in pictures.items():
        folder, file = posixpath.split(key)
        first = posixpath.join(folder, file.partition(".")[0])
        if key not in described and first != key and first in pictures:
            told.add("further pictures of a sample", f"{path}/{name}")
            continue
        parts = described.get(key if key in described else first, {})
        members.append(Member(name, span, parts.get(".txt"), parts.get(".json"), parts.get(".cls")))
    if left is None:
        told.say(f"{len(members)} pictures; left out")
    return members


def is_shard(path: Path) -> bool:
    """Whether a place is called as an uncompressed tar file is."""
    return path.suffix == ".tar"


def list_shards(folder: Path) -> list[Path]:
    """The shards in a folder by name; none where it holds something else.

    Raises:
        DataError: compressed shards, or a folder that cannot be read.
    """
    found = [name for name in names(folder) if not name.startswith(".")]
    shards = [folder / name for name in found if name.endswith(".tar")]
    shards = [path for path in shards if is_file(path)]
    if not shards and any(".tar." in name or name.endswith(".tgz") for name in found):
        raise DataError(f"{folder} holds compressed shards: decompress them, pictures are anyway")
    return shards


def _means_one_shard(path: Path) -> bool:
    """Whether a place is a shard by its name, and on this machine no folder of that name."""
    return is_shard(path) and (is_remote(path) or not is_folder(path))


def find_shards(source: str | Path | list[Path]) -> list[Path]:
    """The shards that ``source`` means: a folder's, one, or those of a pattern with braces, on this
    machine or by URL. None where it means folders of something else. A list is what was found
    before.

    Raises:
        DataError: nothing of that name, shards beside folders of something else, or one twice.
    """
    if isinstance(source, list):
        return source
    found: list[Path] = []
    other = []
    for text in expand(source) if isinstance(source, str) else [source]:
        path = place(text)
        if _means_one_shard(path):
            if not is_remote(path):
                require_file(path)
            found.append(path)
        elif not is_folder(path):
            raise DataError(f"no folder at {text}")
        elif shards := list_shards(path):
            found += shards
        else:
            other.append(text)
    if found and other:
        raise DataError(f"{source} means shards, but {other[0]} holds none")
    check_once(found)
    return found


def check_once(found: Iterable[Path | str]) -> None:
    """That nothing is there twice.

    Raises:
        DataError: naming what is.
    """
    twice, count = max(Counter(found).items(), key=lambda entry: entry[1], default=("", 0))
    if count > 1:
        raise DataError(f"{twice} is named twice")


def beside(source: str | Path) -> int:
    """How many images the folders that ``source`` means hold that are not read, the shards being; a
    line says so of each, and what else there is.

    Raises:
        DataError: see :func:`pictures.find_images`.
    """
    total = 0
    for text in expand(source) if isinstance(source, str) else [source]:
        folder = place(text)
        if _means_one_shard(folder):
            continue
        images, other = find_images(folder, shards=True)
        if images:
            other.add("images beside the shards, which alone are read", images[0], len(images))
        other.say()
        total += len(images)
    return total


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
    read is an error. ``left`` counts what was left out or replaced, and says so now and then.

    Args:
        joint: samples that all processes take together for one micro-batch.
        weight_key: the key of a sample's weight in its ``.json`` (1 where it has none); "" is 1 for
            all. It is read when the shard is opened.

    Raises:
        DataError: streams that do not fit the batch or the number of shards.
    """

    #: What a picture must be to be read, for messages.
    wanted = "to train on"

    def __init__(
        self,
        paths: list[Path],
        streams: tuple[int, int],
        joint: int,
        seed: int,
        *,
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
                f"{parent(paths[0])} holds {len(paths)} shards, too few for data.streams = "
                f"{list(streams)}"
            )
        self.paths, self.streams, self.joint, self.seed = paths, (across, along), joint, seed
        self.weight_key = weight_key
        self.left = Tally(parent(paths[0]), everyone=True)  # processes open shards of their own
        self.beside = 0  # images in the folder that are in no shard
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
        more = f" ({self.beside} images beside them are not read)" if self.beside else ""
        return f"{len(self.paths)} shards{' by weight' * bool(self.weight_key)}{more}"

    def listing(self) -> Iterator[str]:
        """Everything there is by name."""
        for path in self.paths:
            yield f"{path.name} {state(path)[0]} {self.weight_key}"

    # -- what is in a shard -----------------------------------------------------------------------

    def members(self, path: Path) -> list[Member]:
        """The shard's samples."""
        return self._open(path)[0]

    def _open(self, path: Path) -> tuple[list[Member], np.ndarray | None]:
        """The shard's samples and their weights; those of the shards used last stay in memory."""
        if path in self._opened:
            self._opened.move_to_end(path)
            return self._opened[path]
        # What is left out counts once, however often the shard is opened.
        left = Tally(path) if path in self._sizes else self.left
        members = self.select(path, read_members(path, left), left)
        weights = None
        if self.weight_key:
            weights = np.array([self._weight(path, m) for m in members])
        self._sizes[path] = len(members) if weights is None else float(weights.sum())
        for part, unread in zip(self._parts, self._unread, strict=True):
            if unread == {path} and sum(self._sizes[p] for p in part) < 1:
                more = f" (left out: {self.left})" if self.left.total else ""
                raise DataError(f"no picture {self.wanted} in {_named(part)}{more}{self.hint()}")
            unread.discard(path)
        self.left.say_doubled("left out so far")
        self._opened[path] = (members, weights)
        while len(self._opened) > 2 * len(self._parts):
            self._opened.popitem(last=False)
        return members, weights

    def select(self, path: Path, members: list[Member], left: Tally) -> list[Member]:
        """The samples of a shard that are meant: all of them.

        Args:
            left: counts the others.
        """
        return members

    def hint(self) -> str:
        """What a message adds where no sample is meant."""
        return ""

    def _weight(self, path: Path, member: Member) -> float:
        if member.json is None:
            return 1.0
        name = f"{path}/{member.name}"
        entry = decode(crops.read_span(path, member.json), f"the JSON of {name}")
        try:
            return crops.checked_weight(parse_json(entry).get(self.weight_key, 1.0))
        except (ValueError, AttributeError) as error:
            raise DataError(f"data.weight_key={self.weight_key} of {name}: {error}") from error

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
            return crops.draw_round(rng, len(members), weights, visits)

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
        return self.read_or_another(*self.place(index), index)

    def read_or_another(self, path: Path, number: int, luck: int) -> Any:
        """As :meth:`read`; of a broken sample one that the number ``luck`` picks of its shard."""
        try:
            return self.read(path, number)
        except BrokenImageError as error:
            rng, count = counted_rng(self.seed, 2, luck), len(self.members(path))
            for spare in rng.permutation(count)[:_SPARES].tolist():
                try:
                    found = self.read(path, spare)
                except BrokenImageError:
                    continue
                self.left.add("times another picture was taken for a broken one", str(error))
                self.left.say_doubled("left out so far")
                return found
            tried = min(count, _SPARES)
            raise DataError(f"{error}; nor can {tried} others of its shard be read") from error

    def read(self, path: Path, number: int) -> Any:
        """The sample of that number in a shard: its image.

        Raises:
            DataError: naming shard and member.
        """
        member = self.members(path)[number]
        return open_image(f"{path}/{member.name}", crops.read_span(path, member.picture))

    def regions(self, index: int) -> list[Image.Image]:
        """What sample ``index`` of the run may be cut from (see :class:`data.RandomCrops`)."""
        return [self.at(index)]


def _named(paths: list[Path]) -> str:
    """A few of the paths."""
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(map(str, paths[:4])) + more


def first_pictures(paths: list[Path], count: int) -> list[Picture]:
    """The pictures of the first shards that hold ``count`` of them together."""
    found: list[Picture] = []
    for path in paths:
        found += [Picture(path, span=m.picture, member=m.name) for m in read_members(path)]
        if len(found) >= count:
            break
    return found
