"""``tokenflow tokenize``: every unit of a corpus to a shard of tokens, by one process or many."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenflow_ext.train.config import CaptionConfig, LabelConfig
from tokenflow_ext.train.data import DataError, text_files
from tokenflow_ext.train.data.places import place
from tokenflow_ext.train.data.tokens import INDEX, LAYOUTS, facts, fingerprint
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes, find_device, processes
from tokenflow_ext.train.engine.precision import find_dtype

from .decoding import Batch, Decoded, read_batches
from .encoding import EncodedUnit, Encoder, encode_units
from .sources import Corpus, Keys, Unit, open_corpus
from .writing import Shard, check_target, finish, writing

_NEVER = timedelta(days=3650)  # processes wait for the slowest, however long it takes


@dataclass(frozen=True)
class Job:
    """What a process must know to tokenize units; it may be sent to another machine.

    ``about`` says what the tokens are made of. ``strict`` ends at the first picture that cannot be
    read.
    """

    checkpoint: str
    resolution: int | None
    out: str
    about: dict[str, Any]
    keys: Keys
    batch_size: int = 32
    workers: int = 0
    strict: bool = False

    @property
    def layout(self) -> str:
        """Of the shards."""
        return self.about["layout"]

    @property
    def dtype(self) -> str:
        """Of the encoders' arithmetic."""
        return self.about["dtype"]

    def shard(self, unit: Unit) -> Shard:
        """Where a unit's tokens are written."""
        return Shard(place(self.out), unit.number, self.layout)


@dataclass
class Done:
    """What became of some units: their shards as the index lists them, by number, and what it
    took."""

    shards: dict[int, dict[str, Any]] = field(default_factory=dict)
    earlier: int = 0  # of these were there already
    images: int = 0  # that were encoded now
    seconds: float = 0.0
    waiting: float = 0.0  # of these, for decoded pictures
    failures: Counter[str] = field(default_factory=Counter)  # by kind
    notes: list[str] = field(default_factory=list)  # of what is left out, where nobody was told

    def add(self, other: Done) -> None:
        """Add what became of others; of times the sums."""
        self.shards |= other.shards
        self.earlier += other.earlier
        self.images += other.images
        self.seconds += other.seconds
        self.waiting += other.waiting
        self.failures += other.failures
        self.notes += other.notes

    @property
    def speed(self) -> str:
        """For people."""
        if not self.images or not self.seconds:
            return "nothing was encoded"
        return (
            f"{self.images / self.seconds:.1f} images/s, {self.waiting / self.seconds:.0%} of the "
            "time waiting for data"
        )


def tokenize(
    sources: str | Path | Sequence[str],
    source: str,
    out: str,
    *,
    engine: str = "torch",
    device: str = "auto",
    resolution: int | None = None,
    dtype: str = "float32",
    layout: str = "safetensors",
    batch_size: int = 32,
    workers: int = 0,
    shard_size: int = 4096,
    strict: bool = False,
    caption_keys: Sequence[str] = CaptionConfig.caption_keys,
    label_keys: Sequence[str] = LabelConfig.label_keys,
    ray_workers: int | None = None,
) -> Path:
    """Write the tokens of every picture of ``sources`` as shards; returns the index's path.

    Pictures that cannot be read are left out, and named in the index. The index (index.json) is
    written last: a folder without it is not finished, and is gone on with by the same call. Shards
    that are finished are verified, and left as they are. See docs/guides/tokenizing.md.

    Under torchrun each process takes its part of the units. The bytes written are the same for any
    number of processes, workers and for each engine.

    Args:
        sources: folders of pictures or WebDataset shards, shards, or patterns of them; see
            :func:`.sources.open_corpus`.
        source: the tokenizer; see :func:`checkpoint.load_tokenizer`.
        out: the folder, or a URL that can be written to.
        engine: "torch" (this process, or torchrun's), or "ray" (Ray Data).
        dtype: of the encoders' arithmetic: float32, bfloat16 or float16.
        layout: of the shards: "safetensors" or "webdataset".
        batch_size: pictures at once in a process.
        workers: processes that decode, beside each that encodes.
        shard_size: pictures of a folder in a shard; of a WebDataset shard one is made.
        strict: whether a picture that cannot be read ends it.
        ray_workers: actors of Ray; None is one a GPU, or one a core where there is none.

    Raises:
        OutputError: ``out`` holds other things, or tokens of something else.
        ConfigError: no such dtype or device.
        DataError: a source that cannot be read, or no picture in any.
    """
    if layout not in LAYOUTS:
        raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    find_dtype(dtype)  # before anything is read
    if engine not in ("torch", "ray"):
        raise DataError(f"engine must be torch or ray, got {engine}")
    if engine == "torch" and ray_workers is not None:
        raise DataError("--ray-workers is for --engine ray")
    if engine == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DataError("--engine ray starts its own processes: run it without torchrun")
    names = [str(sources)] if isinstance(sources, (str, Path)) else list(sources)
    keys = Keys(tuple(caption_keys), tuple(label_keys))
    with ExitStack() as stack:
        if engine == "ray":  # the driver needs no device of its own
            group = Processes(0, 1, find_device("cpu"))
        else:
            group = stack.enter_context(processes(device, _NEVER))
        target = place(out)
        with group.together():
            if group.first:
                check_target(target)
        model, found = checkpoint.load_tokenizer(source, resolution)
        corpus = open_corpus(names, shard_size, keys, layout == "webdataset")
        group.check_same("sources", corpus.digest)
        about = facts(model, found) | {
            "version": LAYOUTS[layout],
            "layout": layout,
            "dtype": dtype,
            "tokenizer_sha256": fingerprint(model),
            "data_sha256": corpus.digest,
            "shard_size": shard_size,
        }
        job = Job(source, resolution, out, about, keys, batch_size, workers, strict)
        finished = False
        with group.together():
            if group.first:
                finished = stack.enter_context(writing(target, about))
        if group.gather(finished)[0]:
            if group.first:
                print(f"the same tokens are there already: {target / INDEX}")
            return target / INDEX
        if engine == "ray":
            from .ray_engine import run_units

            parts = [run_units(job, corpus, device, ray_workers)]
        else:
            encoder = Encoder(model, group.device, job.dtype)
            units = corpus.units[group.rank :: group.world]
            parts = group.gather(tokenize_units(job, units, encoder, show=group.first))
        with group.together():
            if group.first:
                _finish(target, job, corpus, parts)
    return target / INDEX


def finished_units(job: Job, units: Sequence[Unit]) -> tuple[Done, list[Unit]]:
    """Which of the units an earlier run has finished, and the others."""
    done, todo = Done(), []
    for unit in units:
        if (receipt := job.shard(unit).written()) is None:
            todo.append(unit)
        else:
            done.shards[unit.number] = receipt
    done.earlier = len(done.shards)
    return done, todo


def tokenize_units(
    job: Job, units: Sequence[Unit], encoder: Encoder, show: bool = True, tell: bool = True
) -> Done:
    """Tokenize those of the units that are not finished, and write their shards.

    Args:
        show: a progress bar.
        tell: print a line of each thing that is left out, when it is met; otherwise the lines are
            in what is returned.
    """
    done, todo = finished_units(job, units)
    known = None if any(unit.tar for unit in units) else sum(len(u.pictures) for u in units)
    dataset = Decoded(todo, job.about["image_size"], job.batch_size, job.keys)
    start = time.perf_counter()
    with tqdm(total=known, unit="image", disable=not show) as bar, ThreadPoolExecutor(1) as pool:
        if known is not None:
            bar.update(known - sum(len(unit.pictures) for unit in todo))
        say = partial(text_files.say, everyone=True) if tell else done.notes.append
        batches = _watched(read_batches(dataset, job.workers), job, done, bar, say)
        by_number = {unit.number: unit for unit in todo}
        pending: list[Future[tuple[int, dict[str, Any]]]] = []
        for encoded in encode_units(batches, encoder, ahead=encoder.device.type == "cuda"):
            if encoded.left is not None and encoded.left.total:
                say(f"{encoded.left.where}: left out: {encoded.left}")
            if len(pending) == 2:  # writing overlaps, and memory stays bounded
                _settle(pending.pop(0), done)
            pending.append(pool.submit(_write, job, by_number[encoded.number], encoded))
        for future in pending:
            _settle(future, done)
    done.seconds = time.perf_counter() - start
    return done


def _write(job: Job, unit: Unit, encoded: EncodedUnit) -> tuple[int, dict[str, Any]]:
    shard = job.shard(unit)
    receipt = shard.write(encoded.tokens, encoded.rows, encoded.skipped, job.about, unit.source)
    return unit.number, receipt


def _settle(future: Future[tuple[int, dict[str, Any]]], done: Done) -> None:
    number, receipt = future.result()
    done.shards[number] = receipt


def _watched(
    batches: Iterable[Batch], job: Job, done: Done, bar: tqdm, say: Callable[[str], Any]
) -> Iterator[Batch]:
    """The batches, with what they say of time and failures noted and shown.

    Raises:
        DataError: a picture that cannot be read, where that is not to be passed over.
    """
    start, asked = time.perf_counter(), time.perf_counter()
    for batch in batches:
        now = time.perf_counter()
        done.waiting += now - asked
        for _, kind, message in batch.broken:
            if job.strict:
                raise DataError(message)
            say(f"left out: {message}")  # one of a million must not end the others
            done.failures[kind] += 1
        done.images += len(batch.rows)
        bar.set_postfix_str(
            f"waiting {done.waiting / (now - start + 1e-9):.0%}"
            + (f", {done.failures.total()} broken" if done.failures else ""),
            refresh=False,
        )
        bar.update(len(batch.rows) + len(batch.broken))
        yield batch
        asked = time.perf_counter()


def _finish(target: Path, job: Job, corpus: Corpus, parts: list[Done]) -> None:
    """Write the index, and say what was done."""
    by_number = {number: shard for part in parts for number, shard in part.shards.items()}
    missing = [unit.number for unit in corpus.units if unit.number not in by_number]
    if missing:
        raise DataError(f"shard {missing[0]} was not made")
    shards = [by_number[unit.number] for unit in corpus.units]
    written = [shard for shard in shards if shard["count"]]
    images = sum(shard["count"] for shard in written)
    if not images:
        raise DataError(f"no image below {', '.join(corpus.sources)} can be read")
    for shard in written:
        if not (target / shard["tokens"]).is_file():
            raise DataError(
                f"{target / shard['tokens']} was written by another process and is not here: --out "
                "must be a place that all processes share"
            )
    skipped = [name for shard in shards for name in shard["skipped"]]
    listed = [{k: v for k, v in shard.items() if k != "skipped"} for shard in written]
    index = job.about | {"images": images, "skipped": skipped, "shards": listed}
    path = finish(target, index, [job.shard(unit) for unit in corpus.units])
    if earlier := sum(part.earlier for part in parts):
        print(f"{earlier} shards were there already, of a run that was broken off")
    if skipped:
        print(f"{len(skipped)} images cannot be read and were left out; {path} names them")
        for kind, count in sum((part.failures for part in parts), Counter()).most_common():
            print(f"  {count}: {kind}")
    longest = max(part.seconds for part in parts)
    whole = Done(
        images=sum(part.images for part in parts),
        seconds=longest,
        waiting=longest * sum(p.waiting for p in parts) / max(1e-9, sum(p.seconds for p in parts)),
    )
    print(f"{images} images, {job.about['tokens_per_image']} tokens each, {path}")
    print(whole.speed)
