"""What `tokenflow tokenize` adds to decoding and encoding: `python -m benchmarks.corpus`.

JPEGs of 256 px in WebDataset shards, made here, and a tokenizer of the tiny preset with random
weights. In each round, in turn: decoding alone, encoding alone, both as the command does them in
one process of one thread, and the command in two processes of one thread each (torchrun). Every
part is a program of its own. Speeds are images a second without a program's start, which is listed
beside them, and peak memory is the resident set. Writes table.md and results.json.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import comparison
from benchmarks.tables import Table
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.config import load_config
from tokenflow_ext.train.corpus.decoding import Decoded, read_batches
from tokenflow_ext.train.corpus.encoding import Encoder
from tokenflow_ext.train.corpus.sources import Keys, open_corpus
from tokenflow_ext.train.corpus.tokenize import tokenize

_SIDE, _BATCH = 256, 32


def make_corpus(folder: Path, images: int, shards: int) -> str:
    """Shards of JPEGs of smooth noise; returns the pattern that names them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"part-{shard:05d}.tar", "w") as archive:
            for i in range(shard, images, shards):
                small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                file = io.BytesIO()
                small.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(file, "JPEG")
                member = tarfile.TarInfo(f"{i:08d}.jpg")
                member.size = len(file.getvalue())
                archive.addfile(member, io.BytesIO(file.getvalue()))
    return f"{folder}/part-{{00000..{shards - 1:05d}}}.tar"


def make_tokenizer(folder: Path) -> Path:
    """The tiny preset with random weights."""
    torch.manual_seed(0)
    return TokenFlowTokenizer(load_config().model).save_pretrained(folder)


# -- the parts, each in a process of its own ------------------------------------------------------


def decode_alone(source: str, checkpoint: str, out: str) -> dict[str, float]:
    """Every picture decoded, and nothing done with it."""
    size = TokenFlowTokenizer.from_pretrained(checkpoint).config.image_size
    dataset = Decoded(open_corpus([source], 1, Keys()).units, size, _BATCH, Keys())
    start = time.perf_counter()
    images = sum(len(batch.rows) for batch in read_batches(dataset, 0))
    return {"images": images, "seconds": time.perf_counter() - start}


def encode_alone(source: str, checkpoint: str, out: str) -> dict[str, float]:
    """As many pictures encoded as there are, of one batch that is decoded before."""
    model = TokenFlowTokenizer.from_pretrained(checkpoint)
    corpus = open_corpus([source], 1, Keys())
    dataset = Decoded(corpus.units, model.config.image_size, _BATCH, Keys())
    total = sum(1 for unit in corpus.units for _ in _members(unit.tar))
    encoder, pixels = Encoder(model, torch.device("cpu")), next(read_batches(dataset, 0)).pixels
    encoder(pixels)
    start = time.perf_counter()
    for done in range(0, total, _BATCH):
        encoder(pixels[: total - done])
    return {"images": total, "seconds": time.perf_counter() - start}


def _members(path: str) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def both(source: str, checkpoint: str, out: str) -> dict[str, float]:
    """The command's own function; its time is that of its last line."""
    tokenize(source, checkpoint, out, device="cpu", batch_size=_BATCH)
    return {}


def by_tens(source: str, checkpoint: str, out: str) -> dict[str, float]:
    """The same in batches of ten, so that ten images and many have batches alike."""
    tokenize(source, checkpoint, out, device="cpu", batch_size=10)
    return {}


PARTS = {"decode": decode_alone, "encode": encode_alone, "tokenize": both, "by tens": by_tens}


def run_part(part: str, source: str, checkpoint: Path, out: Path, processes: int = 1) -> dict:
    """A part in one process, or in several under torchrun, of one thread each.

    Returns:
        its images a second, its wall-clock time with its start, and peak memory (MiB; of the
        launcher where there is one).
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.corpus", "--part", part, source, str(checkpoint), str(out)]
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} has failed: {output}")
    last = output.strip().splitlines()[-1]
    speed = float(last.split(" images/s")[0])
    return {"speed": speed, "wall": wall, "memory": usage.ru_maxrss / 1024}


# -- the comparison -------------------------------------------------------------------------------


def compare(images: int, shards: int, rounds: int) -> dict[str, Any]:
    """Every part in turn, so many rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_tokenizer(folder / "tokenizer")
        source = make_corpus(folder / "corpus", images, shards)
        few = make_corpus(folder / "few", 10, 1)
        found: dict[str, list[dict[str, float]]] = {}

        def measure(what: str, *arguments: Any, **options: Any) -> None:
            out = folder / f"out-{len(found.get(what, []))}-{what.replace(' ', '-')}"
            row = run_part(*arguments, checkpoint=checkpoint, out=out, **options)
            found.setdefault(what, []).append(row)

        for _ in range(rounds):
            measure("decoding alone", "decode", source)
            measure("encoding alone", "encode", source)
            measure("tokenize", "tokenize", source)
            measure("tokenize, two processes", "tokenize", source, processes=2)
        measure("by tens, ten images", "by tens", few)
        measure("by tens", "by tens", source)
        same = [
            sorted((p.name, p.read_bytes()) for p in (folder / f"out-0-{what}").iterdir())
            for what in ("tokenize", "tokenize,-two-processes")
        ]
        if same[0] != same[1]:
            raise RuntimeError("one process and two have written different bytes")

    def median(what: str, key: str) -> float:
        return statistics.median(row[key] for row in found[what])

    allowed = [
        1 / (1 / d["speed"] + 1 / e["speed"])
        for d, e in zip(found["decoding alone"], found["encoding alone"], strict=True)
    ]
    one = found["tokenize"]
    two = found["tokenize, two processes"]
    return {
        "images": images,
        "shards": shards,
        "rounds": rounds,
        "rows": {
            what: {key: median(what, key) for key in ("speed", "wall", "memory")} for what in found
        },
        "of what both allow": statistics.median(
            row["speed"] / most for row, most in zip(one, allowed, strict=True)
        ),
        "two processes": statistics.median(
            b["speed"] / a["speed"] for a, b in zip(one, two, strict=True)
        ),
        "two processes, wall clock": statistics.median(
            a["wall"] / b["wall"] for a, b in zip(one, two, strict=True)
        ),
        "memory of many": median("by tens", "memory") / median("by tens, ten images", "memory"),
    }


def as_markdown(result: dict[str, Any], facts: dict[str, Any]) -> str:
    """The table, and what follows from it."""
    cells = [
        {
            "": what,
            "images/s": f"{row['speed']:.1f}",
            "wall clock with start": f"{row['wall']:.1f} s",
            "peak memory": "" if "two" in what else f"{row['memory']:.0f} MiB",
        }
        for what, row in result["rows"].items()
    ]
    lines = [
        "# Tokenizing a corpus",
        "",
        *Table("", cells, "").lines(),
        "",
        f"- one process: {result['of what both allow']:.1%} of what decoding alone and encoding "
        "alone allow after each other",
        f"- two processes of one thread over one: {result['two processes']:.2f} times the images a "
        f"second, {result['two processes, wall clock']:.2f} by the wall clock with their start",
        f"- peak memory of {result['images']:,} images over that of ten, in batches of ten: "
        f"{result['memory of many']:.2f}",
        f"- {result['images']:,} JPEGs of {_SIDE} px in {result['shards']} shards, batches of "
        f"{_BATCH}, the tiny preset (64 px); medians of {result['rounds']} rounds; both wrote the "
        "same bytes",
        f"- {comparison.place(facts)}",
        *comparison.ending(facts),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=10_000, help="[%(default)s]")
    parser.add_argument("--shards", type=int, default=20, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/corpus"), metavar="DIR")
    parser.add_argument(
        "--part", nargs=4, metavar=("PART", "SOURCE", "CHECKPOINT", "OUT"), help=argparse.SUPPRESS
    )
    known = parser.parse_args(given)
    if known.part:
        part, *arguments = known.part
        torch.set_num_threads(1)
        done = PARTS[part](*arguments)
        if done:
            print(f"{done['images'] / done['seconds']:.3f} images/s")
        return
    if min(known.images, known.shards, known.rounds) < 1 or known.images < known.shards:
        parser.error("--images, --shards and --rounds must be 1 or more, and no shard empty")
    shared = comparison.training_facts()
    result = compare(known.images, known.shards, known.rounds)
    facts = comparison.now(
        shared,
        [],
        **comparison.where(shared, "cpu"),
        command=shlex.join(["python", "-m", "benchmarks.corpus", *given]),
    )
    facts["threads"] = 1
    comparison.write(known.out, as_markdown(result, facts), facts, [result])
    print((known.out / "table.md").read_text())


if __name__ == "__main__":
    main()
