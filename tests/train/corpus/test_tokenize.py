"""Corpora to tokens: any source, any number of processes and both engines give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import hub_server
import numpy as np
import pytest
import torch
import torchrun
import webdataset
from archives import write_tar
from loopback import serve
from PIL import Image

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.config import CaptionConfig, LabelConfig
from tokenflow_ext.train.corpus import decoding, sources
from tokenflow_ext.train.corpus.tokenize import tokenize
from tokenflow_ext.train.data import captions, labels, tokens
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.data.outputs import OutputError
from tokenflow_ext.train.data.places import place
from tokenflow_ext.train.data.text_files import DataError

SCALES = [(1, 1), (2, 2), (4, 4)]
COMMAND = Path(sys.executable).with_name("tokenflow")


def jpeg(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    """A picture of coloured waves."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def sample(key: str, seed: int, label: int | None = None) -> dict[str, bytes]:
    """The members of a sample of a WebDataset shard."""
    found = {f"{key}.jpg": jpeg(seed), f"{key}.txt": f"number {seed}".encode()}
    return found | ({} if label is None else {f"{key}.cls": str(label).encode()})


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five shards of three, none and up to nine samples; one holds broken pictures."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, count in enumerate((3, 9, 5, 1, 4)):
        members: dict[str, bytes] = {}
        for i in range(count):
            members |= sample(f"{shard}_{i}", 10 * shard + i, label=i % 3)
        if shard == 2:
            members["2_1.jpg"] = b"no image"
            members["2_3.jpg"] = members["2_3.jpg"][:300]
        write_tar(folder / f"part-{shard:03d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def pattern(shards) -> str:
    return f"{shards}/part-{{000..004}}.tar"


def run(source, image_tokenizer, out, **options) -> Path:
    given = {"batch_size": 2, "device": "cpu"} | options
    return tokenize(source, str(image_tokenizer), str(out), **given)


def files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(pattern, image_tokenizer, tmp_path_factory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("expected") / "tokens"
    run(pattern, image_tokenizer, folder)
    return folder


def arguments(source: str, image_tokenizer: Path, out: Path, *more: str) -> list[str]:
    words = ["tokenize", source, "--checkpoint", str(image_tokenizer), "--out", str(out)]
    return [*words, "--batch-size", "2", "--device", "cpu", *more]


# -- what is written ------------------------------------------------------------------------------


def test_shards_keep_captions_classes_and_order(shards, expected, image_tokenizer):
    """Against the tokenizer itself, sample by sample, read by tarfile alone."""
    index = json.loads((expected / "index.json").read_text())
    assert [s["source"] for s in index["shards"]] == [f"part-{i:03d}.tar" for i in range(5)]
    assert [s["count"] for s in index["shards"]] == [3, 9, 3, 1, 4]
    assert index["skipped"] == ["part-002.tar/2_1.jpg", "part-002.tar/2_3.jpg"]
    read, rows = tokens.read_rows(expected, SCALES, 64)
    model = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    names = [(s, i) for s, n in enumerate((3, 9, 5, 1, 4)) for i in range(n)]
    names = [name for name in names if name not in ((2, 1), (2, 3))]
    assert [row["image"] for row in rows] == [f"{s}_{i}.jpg" for s, i in names]
    for (s, i), row, codes in zip(names, rows, torch.cat(read), strict=True):
        assert (row["caption"], row["label"]) == (f"number {10 * s + i}", str(i % 3))
        picture = expected.parent / "picture.jpg"
        picture.write_bytes(jpeg(10 * s + i))
        assert torch.equal(codes.long(), model.encode(read_square(picture, 32)[None])[0])


def test_a_tar_of_tokens_is_a_webdataset(pattern, expected, image_tokenizer, tmp_path):
    """webdataset's own reader finds tokens, captions and classes under the original keys."""
    out = tmp_path / "tokens"
    run(pattern, image_tokenizer, out, layout="webdataset")
    read, rows = tokens.read_rows(expected, SCALES, 64)
    found = list(
        webdataset.WebDataset(
            [str(out / f"tokens-{i:05d}.tar") for i in range(5)], shardshuffle=False
        ).decode()
    )
    assert [f"{x['__key__']}.jpg" for x in found] == [row["image"] for row in rows]
    for x, row, codes in zip(found, rows, torch.cat(read), strict=True):
        assert x["tokens.npy"].dtype == np.int32
        assert np.array_equal(x["tokens.npy"], codes.numpy())
        assert (x["txt"], str(x["cls"])) == (row["caption"], row["label"])
    again, listed = tokens.read_rows(out, SCALES, 64)
    assert torch.equal(torch.cat(again), torch.cat(read))
    assert listed == rows
    # Training takes either.
    assert (
        captions.Tokens(out, SCALES, 64).captions == captions.Tokens(expected, SCALES, 64).captions
    )
    form = captions.Form(32, SCALES, 64)
    assert labels.Tokens(out, form, LabelConfig()).labels == [row["label"] for row in rows]


def test_a_folder_as_webdataset(image_tokenizer, tmp_path):
    """Keys end at the first dot, and are told apart in a shard."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "a.png", "b.v2.jpg", "deep/c.jpg"):
        Image.open(io.BytesIO(jpeg(len(name)))).save(folder / name)
    (folder / "b.v2.txt").write_text("two")
    run(str(folder), image_tokenizer, tmp_path / "tokens", layout="webdataset")
    found = webdataset.WebDataset(str(tmp_path / "tokens/tokens-00000.tar"), shardshuffle=False)
    assert [x["__key__"] for x in found] == ["a", "a~2", "b_v2", "deep/c"]
    assert [x.get("txt") for x in found] == [None, None, b"two", None]


@pytest.mark.parametrize(
    "options", [{"workers": 1}, {"workers": 3}, {"batch_size": 2, "shard_size": 3}]
)
def test_workers_change_no_byte(pattern, shards, expected, image_tokenizer, tmp_path, options):
    run(str(shards), image_tokenizer, tmp_path / "tokens", **({"shard_size": 4096} | options))
    found, wanted = files(tmp_path / "tokens"), files(expected)
    if "shard_size" in options:  # of a folder's pictures alone, and named in the index
        del found["index.json"], wanted["index.json"]
        found = {k: v for k, v in found.items() if k.endswith(".json")}
        wanted = {k: v for k, v in wanted.items() if k.endswith(".json")}
    assert found == wanted


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_folders_and_shards_together(micro, shards, image_tokenizer, tmp_path, workers):
    """In the order given; several workers share the batches of a folder."""
    pictures = micro.draw_images(tmp_path / "pictures", count=7)
    (pictures / "picture3.png").write_bytes(b"no image")
    out = tmp_path / "tokens"
    given = [str(pictures), f"{shards}/part-000.tar"]
    run(given, image_tokenizer, out, shard_size=3, workers=workers)
    index = json.loads((out / "index.json").read_text())
    assert [shard["count"] for shard in index["shards"]] == [3, 2, 1, 3]
    assert index["skipped"] == ["picture3.png"]
    assert [r["image"] for r in tokens.read_rows(out, SCALES, 64)[1]] == [
        *(f"picture{i}.png" for i in (0, 1, 2, 4, 5, 6)),
        *(f"0_{i}.jpg" for i in range(3)),
    ]


@pytest.mark.once
def test_two_processes_write_the_same_bytes(pattern, expected, image_tokenizer, tmp_path):
    words = arguments(pattern, image_tokenizer, tmp_path / "tokens")
    output = torchrun.finish(torchrun.launch(COMMAND, words, processes=2))
    assert "2 images cannot be read" in output
    assert "of no known format" in output
    assert files(tmp_path / "tokens") == files(expected)


@pytest.mark.once
def test_ray_writes_the_same_bytes(pattern, expected, image_tokenizer, tmp_path):
    pytest.importorskip("ray.data")
    words = arguments(pattern, image_tokenizer, tmp_path / "tokens", "--engine", "ray")
    torchrun.finish(torchrun.launch(COMMAND, [*words, "--ray-workers", "2"]))
    assert files(tmp_path / "tokens") == files(expected)


def test_half_precision_is_told_apart(pattern, expected, image_tokenizer, tmp_path):
    out = tmp_path / "tokens"
    run(pattern, image_tokenizer, out, dtype="bfloat16")
    assert json.loads((out / "index.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(OutputError, match="computed in another dtype"):
        run(pattern, image_tokenizer, out)
    shutil.copytree(expected, tmp_path / "copy")
    with pytest.raises(OutputError, match="in another layout"):
        run(pattern, image_tokenizer, tmp_path / "copy", layout="webdataset")


# -- broken off -----------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("engine", ["one", "torchrun"])
def test_killed_and_gone_on_with(shards, image_tokenizer, tmp_path, engine):
    """SIGKILL once shards are there: what is finished is not made again, the end is the same."""
    many = tmp_path / "many"
    many.mkdir()
    for i in range(40):
        shutil.copy(shards / f"part-{i % 5:03d}.tar", many / f"part-{i:03d}.tar")
    run(str(many), image_tokenizer, tmp_path / "whole")
    out = tmp_path / "tokens"
    words = arguments(str(many), image_tokenizer, out)
    processes = 0 if engine == "one" else 2
    process = torchrun.launch(COMMAND, words, processes=processes)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.done.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.3)
    if (out / "index.json").exists():
        pytest.skip("the machine was too fast: nothing was left to do")
    with pytest.raises(DataError, match="not finished"):
        captions.Tokens(out, SCALES, 64)
    finished = {p: p.stat().st_mtime_ns for p in out.glob("*.done.json")}
    assert finished
    output = torchrun.finish(torchrun.launch(COMMAND, words, processes=processes))
    assert f"{len(finished)} shards were there already" in output
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_shard_that_is_not_what_was_written_is_made_again(
    pattern, expected, image_tokenizer, tmp_path, monkeypatch, suffix, damage
):
    out = tmp_path / "tokens"
    begun(pattern, image_tokenizer, out, monkeypatch, shards=2)
    path = out / f"tokens-00000{suffix}"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:  # of the same length, where it is not cut
        path.write_bytes(content[:-3] if damage == "cut" else content[:-2] + b"\1\1")
    run(pattern, image_tokenizer, out)
    assert files(out) == files(expected)


def begun(source, image_tokenizer, out, monkeypatch, shards: int) -> None:
    """A run that ends after so many shards."""
    with monkeypatch.context() as patch:
        read = decoding.Decoded._batches

        def limited(self, unit, number):
            if unit.number == shards:
                raise KeyboardInterrupt
            return read(self, unit, number)

        patch.setattr(decoding.Decoded, "_batches", limited)
        with pytest.raises(KeyboardInterrupt):
            run(source, image_tokenizer, out)
    assert len(list(out.glob("*.done.json"))) == shards


def test_a_finished_folder_is_verified(pattern, expected, image_tokenizer, tmp_path, capsys):
    out = tmp_path / "tokens"
    shutil.copytree(expected, out)
    run(pattern, image_tokenizer, out)
    assert "there already" in capsys.readouterr().out
    path = out / "tokens-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=r"tokens-00001.safetensors .* is not what was written"):
        run(pattern, image_tokenizer, out)


def test_other_keys_of_captions_are_not_mixed_in(shards, image_tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "tokens"
    begun(str(shards), image_tokenizer, out, monkeypatch, shards=2)
    with pytest.raises(OutputError, match="of other pictures or captions"):
        run(str(shards), image_tokenizer, out, caption_keys=["title"])


def test_pictures_beside_shards_are_counted(micro, shards, image_tokenizer, tmp_path, capsys):
    folder = tmp_path / "both"
    shutil.copytree(shards, folder)
    micro.draw_images(folder / "more", count=2)
    run(str(folder), image_tokenizer, tmp_path / "tokens")
    assert "2 images beside the shards" in capsys.readouterr().err


def test_other_shards_of_the_same_names_are_refused(shards, image_tokenizer, tmp_path, monkeypatch):
    copy, out = tmp_path / "shards", tmp_path / "tokens"
    shutil.copytree(shards, copy)
    begun(str(copy), image_tokenizer, out, monkeypatch, shards=2)
    os.utime(copy / "part-003.tar", ns=(1, 1))
    with pytest.raises(OutputError, match="of other pictures or captions"):
        run(str(copy), image_tokenizer, out)


# -- what is left out -----------------------------------------------------------------------------


def test_odd_members_are_counted(image_tokenizer, tmp_path, capsys):
    odd = write_tar(
        tmp_path / "odd.tar",
        {
            **sample("a", 1),
            "a.mask.png": b"further",
            "a.npy": b"neither",
            "._a.jpg": b"hidden",
            "b.txt": b"no picture",
            "c.jpg": jpeg(2),
            "c.JPG": jpeg(2),
            "d.jpg": jpeg(3),
            "d.json": b'{"caption": "from JSON", "label": 4}',
            "e.jpg": jpeg(4),
            "e.json": b"no JSON",
            "f.jpg": jpeg(5),
            "f.txt": b"\xff\xfe",
        },
    )
    run(str(odd), image_tokenizer, tmp_path / "tokens")
    said = capsys.readouterr().err
    for why in (
        "2 files that are neither picture nor text",
        "1 hidden files",
        "1 samples without a picture",
        "1 files of a name that their sample has already",
        "1 descriptions that are not JSON",
        "1 descriptions that are not UTF-8",
    ):
        assert why in said, why
    _, rows = tokens.read_rows(tmp_path / "tokens", SCALES, 64)
    assert [(r["image"], r["caption"], r.get("label")) for r in rows] == [
        ("a.jpg", "number 1", None),
        ("c.jpg", None, None),
        ("d.jpg", "from JSON", "4"),
        ("e.jpg", None, None),
        ("f.jpg", None, None),
    ]


@pytest.mark.parametrize("where", [0.3, 0.55, 0.7])
def test_a_shard_that_ends_early(shards, image_tokenizer, tmp_path, capsys, where):
    """What was read before counts; the break is said."""
    content = (shards / "part-001.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: int(len(content) * where)])
    given = [str(tmp_path / "cut.tar"), f"{shards}/part-000.tar"]
    run(given, image_tokenizer, tmp_path / "tokens")
    assert "shards that end early or are damaged" in capsys.readouterr().err
    index = json.loads((tmp_path / "tokens/index.json").read_text())
    counts = [shard["count"] for shard in index["shards"]]
    assert counts[-1] == 3
    assert 1 <= counts[0] <= 9


@pytest.mark.parametrize("change", ["joined", "header", "no end"])
def test_tarfile_would_pass_over_it(shards, image_tokenizer, tmp_path, capsys, change):
    """Another archive behind the end, a damaged header, and a missing end mark."""
    content = bytearray((shards / "part-000.tar").read_bytes())
    second = content.index(b"0_1.jpg")
    if change == "joined":
        content += (shards / "part-003.tar").read_bytes()
    elif change == "header":
        content[second] ^= 255
    else:
        del content[len(content.rstrip(b"\0")) // 512 * 512 + 512 :]
    (tmp_path / "odd.tar").write_bytes(content)
    run(str(tmp_path / "odd.tar"), image_tokenizer, tmp_path / "tokens")
    assert "1 shards that end early or are damaged" in capsys.readouterr().err
    index = json.loads((tmp_path / "tokens/index.json").read_text())
    assert index["images"] == (1 if change == "header" else 3)


def test_a_shard_without_a_picture_is_no_shard(shards, image_tokenizer, tmp_path):
    write_tar(tmp_path / "empty.tar", {"a.txt": b"alone"})
    write_tar(tmp_path / "broken.tar", {"a.jpg": b"no image"})
    given = [f"{tmp_path}/{{empty,broken}}.tar", f"{shards}/part-000.tar"]
    run(given, image_tokenizer, tmp_path / "tokens")
    index = json.loads((tmp_path / "tokens/index.json").read_text())
    assert [shard["count"] for shard in index["shards"]] == [3]
    assert index["skipped"] == ["broken.tar/a.jpg"]
    assert not list((tmp_path / "tokens").glob("*.done.json"))


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_ends_at_the_first_broken_picture(pattern, image_tokenizer, tmp_path, workers):
    with pytest.raises(DataError, match=r"part-002.tar/2_1.jpg: of no known format"):
        run(pattern, image_tokenizer, tmp_path / "tokens", strict=True, workers=workers)
    assert not (tmp_path / "tokens/index.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{shards}/part-{{000..009}}.tar"], "part-005.tar"),
        (["{shards}", "{shards}/part-000.tar"], "part-000.tar is named twice"),
        (["{shards}/part-000.txt"], "no folder at"),
        (["{shards}/{{1..99999999}}.tar"], "stands for more than"),
        (["nowhere://bucket/x.tar"], "nowhere://bucket/x.tar"),
        (["{shards}", "--engine", "spark"], None),
    ],
)
def test_wrong_sources(shards, image_tokenizer, tmp_path, words, message):
    given = [word.format(shards=shards) for word in words]
    common = ["--checkpoint", str(image_tokenizer), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as raised:
        entry.main(["tokenize", *given, *common])
    if message is None:
        assert raised.value.code == 2
    else:
        assert message in raised.value.code
    assert not (tmp_path / "out").exists()


# -- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_on_the_web(shards, expected, image_tokenizer, tmp_path, ranges, workers):
    """Streamed once each, without a local copy, from servers that know no ranges too."""
    with serve(shards, ranges) as server:
        source = f"{server.url}/part-{{000..004}}.tar"
        run(source, image_tokenizer, tmp_path / "tokens", workers=workers)
        fetched = [path for path, _ in server.asked]
    assert sorted(fetched) == [f"/part-{i:03d}.tar" for i in range(5)]
    found, wanted = files(tmp_path / "tokens"), files(expected)
    for each in (found, wanted):
        del each["index.json"]
    # The tokens' metadata tell which data they are of.
    assert {k: v for k, v in found.items() if k.endswith(".json")} == {
        k: v for k, v in wanted.items() if k.endswith(".json")
    }
    mine, theirs = (tokens.read(f, SCALES, 64)[0] for f in (tmp_path / "tokens", expected))
    assert torch.equal(torch.cat(mine), torch.cat(theirs))


def test_a_dataset_on_the_hub(shards, expected, image_tokenizer, tmp_path, monkeypatch):
    """Its shards are listed and read through the hub's own driver."""
    with hub_server.serve() as hub:
        hub.repository("us/pictures").commit(
            {f"train/{p.name}": p.read_bytes() for p in shards.iterdir()}
        )
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        words = arguments("hf://datasets/us/pictures/train", image_tokenizer, tmp_path / "tokens")
        subprocess.run([COMMAND, *words], check=True, timeout=300)
    wanted, listed = tokens.read_rows(expected, SCALES, 64)
    found, rows = tokens.read_rows(tmp_path / "tokens", SCALES, 64)
    assert torch.equal(torch.cat(found), torch.cat(wanted))
    assert rows == listed


def test_a_connection_that_breaks_ends_the_run(shards, expected, image_tokenizer, tmp_path):
    """Half a shard must not pass for a shard; the run goes on with once the server is well."""
    with serve(shards) as server:
        source = f"{server.url}/part-{{000..004}}.tar"
        server.breaks.add("part-003.tar")
        with pytest.raises(DataError, match=r"cannot read .*part-003.tar"):
            run(source, image_tokenizer, tmp_path / "tokens")
        assert not (tmp_path / "tokens/index.json").exists()
        server.breaks.clear()
        run(source, image_tokenizer, tmp_path / "tokens")
    assert [len(t) for t in tokens.read(tmp_path / "tokens", SCALES, 64)[0]] == [3, 9, 3, 1, 4]


@pytest.fixture
def bucket():
    """A URL of fsspec's file system in memory, with a name of its own."""
    name = f"memory://{uuid.uuid4().hex}"
    yield name
    system = fsspec.filesystem("memory")
    if system.exists(name):
        system.rm(name, recursive=True)


def upload(folder: Path, url: str) -> None:
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("layout", ["safetensors", "webdataset"])
def test_a_bucket_to_a_bucket(shards, expected, image_tokenizer, bucket, layout, capsys):
    upload(shards, f"{bucket}/shards")
    source, out = f"{bucket}/shards", f"{bucket}/tokens"
    run(source, image_tokenizer, out, layout=layout)
    read, rows = tokens.read_rows(place(out), SCALES, 64)
    wanted, listed = tokens.read_rows(expected, SCALES, 64)
    assert torch.equal(torch.cat(read), torch.cat(wanted))
    assert rows == listed
    run(source, image_tokenizer, out, layout=layout)
    assert "there already" in capsys.readouterr().out
    system = fsspec.filesystem("memory")
    assert not [name for name in system.find(out) if "done" in name or "unfinished" in name]
    with pytest.raises(OutputError, match="holds other things"):
        run(source, image_tokenizer, source)


def test_a_folder_of_pictures_in_a_bucket(micro, image_tokenizer, bucket, tmp_path):
    """The same tokens, names, captions and classes as of the folder on the disk."""
    pictures = micro.draw_images(tmp_path / "pictures", count=5)
    (pictures / "picture1.txt").write_text("one")
    (pictures / "picture2.json").write_text('{"text": "two"}')
    (pictures / "sub").mkdir()
    shutil.copy(pictures / "picture0.png", pictures / "sub/again.png")
    upload(pictures, f"{bucket}/pictures")
    run(str(pictures), image_tokenizer, tmp_path / "local", shard_size=2)
    run(f"{bucket}/pictures", image_tokenizer, tmp_path / "remote", shard_size=2)
    mine, theirs = (tokens.read_rows(tmp_path / f, SCALES, 64) for f in ("remote", "local"))
    assert torch.equal(torch.cat(mine[0]), torch.cat(theirs[0]))
    assert mine[1] == theirs[1]
    assert [row["caption"] for row in mine[1]] == [None, "one", "two", None, None, None]


# -- memory ---------------------------------------------------------------------------------------


def test_units_do_not_hang_on_who_decodes_them(shards, pattern):
    """Property: for any batch size and number of workers the batches of a unit are the same."""
    rng = random.Random(0)
    corpus = sources.open_corpus([pattern], 4096, sources.Keys())
    for _ in range(6):
        size = rng.randint(1, 12)
        dataset = decoding.Decoded(corpus.units, 32, size, sources.Keys())
        alone = by_unit(decoding.read_batches(dataset, 0))
        assert by_unit(decoding.read_batches(dataset, rng.randint(1, 4))) == alone
        for unit in alone.values():
            assert [batch[0] for batch in unit] == list(range(len(unit)))
            assert [batch[1] for batch in unit] == [False] * (len(unit) - 1) + [True]


def by_unit(batches) -> dict[int, list]:
    found: dict[int, list] = {}
    for b in batches:
        entry = (b.number, b.last, b.pixels.tolist(), b.rows, b.broken)
        found.setdefault(b.unit, []).append(entry)
    return dict(sorted(found.items()))


def test_keys_of_captions_and_classes_are_those_of_training():
    assert sources.Keys() == sources.Keys(CaptionConfig().caption_keys, LabelConfig().label_keys)
