"""Shards without captions for the tokenizer, weights, broken images."""

from __future__ import annotations

import collections
import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import write_tar
from PIL import Image

from tokenflow_ext.train import data, tokenizer
from tokenflow_ext.train.config import ConfigError, DataConfig, load_config
from tokenflow_ext.train.data.image_files import open_image, to_tensor
from tokenflow_ext.train.data.images import open_images
from tokenflow_ext.train.data.text_files import DataError
from tokenflow_ext.train.data.webdataset import Shards, read_members
from tokenflow_ext.train.engine import checkpoint


def encoded(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 20), (value, value, value)).save(content, "PNG")
    return content.getvalue()


def weight(number: int) -> float:
    return (1.0, 0.3, 2.5)[number % 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """6 shards of 5 to 7 pictures without captions; every level of number n's pixels is n."""
    root, number = tmp_path_factory.mktemp("shards"), 0
    for shard in range(6):
        members = {}
        for _ in range(5 + shard % 3):
            members[f"{number:03d}.png"] = encoded(number)
            if weight(number) != 1:
                entry = {"similarity": 0.3, "faces": weight(number)}
                members[f"{number:03d}.json"] = json.dumps(entry).encode()
            number += 1
        write_tar(root / f"{shard:05d}.tar", members)
    return root


def level(crop: torch.Tensor) -> int:
    """Which picture a crop shows."""
    return round((crop.mean().item() + 1) * 127.5)


def crops(folder: Path, batch: int = 8, seed: int = 3, **settings) -> data.RandomCrops:
    config = DataConfig(path=str(folder), **{"streams": (2, 2), **settings})
    source, _ = open_images(config, batch, seed)
    return data.RandomCrops(source, 16, config, seed)


def test_the_first_shard_is_held_out(folder):
    config = DataConfig(path=str(folder))
    source, held_out = open_images(config, 8, 0)
    first, *others = sorted(folder.glob("*.tar"))
    assert source.paths == others
    shown = data.held_out_crops(held_out, 16, 5)
    assert sorted(map(level, shown)) == list(range(5))
    own = DataConfig(path=str(folder), held_out=str(folder))
    source, held_out = open_images(own, 8, 0)
    assert source.paths == [first, *others]
    assert len(held_out) == sum(len(source.members(path)) for path in source.paths)


def test_processes_share_out_the_shards(folder):
    def taken(world: int, start: int, steps: int) -> list[list[bytes]]:
        seen = []
        for rank in range(world):
            own, share = crops(folder), data.BatchPartition(8, 1, rank, world)
            seen.append([[own[g] for g in share.indices(8 * s, 0)] for s in range(start, steps)])
        return [
            [c.numpy().tobytes() for part in parts for c in part]
            for parts in zip(*seen, strict=True)
        ]

    alone = taken(1, 0, 9)
    assert taken(2, 0, 9) == taken(4, 0, 9) == alone
    assert taken(2, 5, 9) == alone[5:]  # a resumed run needs its position alone
    assert len({c for batch in alone for c in batch}) == 31  # every picture was met


def test_a_round_visits_each_picture_once(folder):
    own = crops(folder, streams=(1, 1))
    count = sum(len(own.source.members(path)) for path in own.source.paths)
    for epoch in range(2):
        seen = [level(own[g]) for g in range(count * epoch, count * (epoch + 1))]
        assert sorted(seen) == list(range(5, 5 + count))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_with_workers(folder, workers):
    own = crops(folder)
    batches = iter(data.loader(crops(folder), data.BatchPartition(8), 16, workers))
    for start in (16, 24, 32):
        assert torch.equal(next(batches), torch.stack([own[start + i] for i in range(8)]))


# -- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 9, 40])
def test_a_weighted_round_has_the_right_counts(length):
    weights = np.array([0.0, 1.0, 0.25, 3.5, 1.25, 2.0, 0.0])
    expected = length * weights / weights.sum()
    total = np.zeros(len(weights))
    rounds = 4000
    for epoch in range(rounds):
        drawn = data.draw_round(data.counted_rng(0, 1, epoch), len(weights), weights, length)
        counts = np.bincount(drawn, minlength=len(weights))
        assert len(drawn) == length
        assert (np.floor(expected - 1e-9) <= counts).all()
        assert (counts <= np.ceil(expected + 1e-9)).all()
        total += counts
    fraction = expected % 1
    error = np.sqrt(fraction * (1 - fraction) / rounds)
    assert (np.abs(total / rounds - expected) <= 5 * error + 1e-9).all()


def test_shards_are_sampled_by_weight(folder):
    # (a fraction of what is in a shard counts by chance, so a round has no fixed length)
    own = Shards(sorted(folder.glob("*.tar")), (1, 1), 4, 0, weight_key="faces")
    numbers = [level(to_tensor(own.read(*own.place(g)))) for g in range(600)]
    counts = collections.Counter(numbers)
    weights = np.array([weight(n) for n in range(36)])
    rounds = 600 / weights.sum()
    seen = np.array([counts[n] for n in range(36)])
    # At most one visit a round is left to chance, and the last round is not whole.
    assert (np.abs(seen - rounds * weights) <= 5 * np.sqrt(rounds / 4) + 3).all()
    again = Shards(own.paths, (1, 1), 4, 0, weight_key="faces")
    assert again.place(599) == own.place(599)  # from the end alone


def test_a_folder_is_sampled_by_weight(images, tmp_path):
    file = tmp_path / "weights.jsonl"
    lines = [
        {"file_name": "picture0.png", "weight": 2.5},
        {"file_name": "picture1.png", "weight": 0},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source, _ = open_images(DataConfig(path=str(images), weights=str(file)), 4, 0)
    numbers = [source.which(g) for g in range(4000)]
    counts = collections.Counter(source.pictures[n].path.name for n in numbers)
    assert set(counts) == {"picture0.png", "picture2.png"}
    assert counts["picture0.png"] == pytest.approx(4000 * 2.5 / 3.5, abs=70)
    again, _ = open_images(DataConfig(path=str(images), weights=str(file)), 4, 0)
    assert [again.which(g) for g in (3999, 0, 77)] == [numbers[g] for g in (3999, 0, 77)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "picture0.png"}', r"line 2.*picture0"),
        ('{"file_name": "picture0.png", "weight": -1}', r"line 2.*-1"),
        ('{"file_name": "picture0.png", "weight": true}', r"line 2.*true"),
        ('{"file_name": "nowhere.png", "weight": 1}', r"does not have, first .*nowhere\.png"),
        ("no JSON", r"line 2.*no JSON"),
        ('{"file_name": "../picture0.png", "weight": 1}', r"line 2.*not below"),
        ('{"file_name": "/picture0.png", "weight": 1}', r"line 2.*not below"),
        ('{"file_name": 3, "weight": 1}', r"line 2.*3"),
        (
            '{"file_name": "picture0.png", "weight": 1}\n'
            '{"file_name": "picture0.png", "weight": 2}',
            "line 3.*another weight already",
        ),
        ('{"file_name": "picture0.png", "weight": 1e300}', r"sum to 1e\+300"),
        ("[" * 9999, "line 2.*nested too deeply"),
    ],
)
def test_weights_that_cannot_be_used_are_named(images, tmp_path, line, message):
    file = tmp_path / "weights.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_images(DataConfig(path=str(images), weights=str(file)), 4, 0)


def test_settings_for_data_of_another_kind_are_refused(folder, images, tmp_path):
    wrong = [
        (DataConfig(path=str(folder), weights="w.jsonl"), "weights is for folders"),
        (DataConfig(path=str(images), weight_key="w"), "weight_key is for shards"),
        (DataConfig(weights="w.jsonl"), r"name it with data\.path"),
        (DataConfig(path="nowhere"), "no folder at nowhere"),
        (DataConfig(path=str(images), held_out="nowhere"), "no folder at nowhere"),
    ]
    for config, message in wrong:
        with pytest.raises(DataError, match=message):
            open_images(config, 4, 0)
    write_tar(tmp_path / "a.tar", {"x.png": encoded(1)})
    with pytest.raises(DataError, match="holds one shard"):
        open_images(DataConfig(path=str(tmp_path)), 4, 0)
    with pytest.raises(ConfigError, match=r"data\.streams must be within \[1, 65536\], got 0"):
        load_config(None, ["data.streams=[0, 1]"])


def test_a_weight_that_is_no_number_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": encoded(1), "x.json": b'{"faces": "two"}'})
    own = Shards([tmp_path / "a.tar"], (1, 1), 1, 0, weight_key="faces")
    with pytest.raises(DataError, match=r"data\.weight_key=faces of .*a\.tar/x\.png.*'two'"):
        own.place(0)
    write_tar(tmp_path / "a.tar", {"x.png": encoded(1), "x.json": b'{"faces": 0}'})
    with pytest.raises(DataError, match=r"no picture to train on in .*a\.tar"):
        own.place(0)


# -- what is in a shard -------------------------------------------------------------------------


def names(path: Path) -> list[str]:
    return [member.name for member in read_members(path)]


def test_names_with_dots_are_samples_of_their_own(tmp_path, capsys):
    members = {"2024.01.05.png": 1, "2024.01.05.txt": 0, "2024.01.06.png": 2, "2024.01.06.json": 0}
    members |= {"a/x.png": 3, "a/x.txt": 0, "a/x.mask.png": 4, "a.b/x.png": 5, "y.left.png": 6}
    members |= {"y.right.PNG": 7, "y.txt": 0, "z.png": 8, "z.v2.png": 9, "z.v2.txt": 0}
    members |= {"lonely.txt": 0, "._z.png": 0, ".hidden.png": 0, "w.jpg": 10, "w.png": 11}
    content = {name: encoded(n) if "txt" not in name else b"cap" for name, n in members.items()}
    path = write_tar(tmp_path / "a.tar", content)
    found = {member.name: member for member in read_members(path)}
    kept = ["2024.01.05.png", "2024.01.06.png", "a/x.png", "a.b/x.png", "y.left.png"]
    assert list(found) == [*kept, "y.right.PNG", "z.png", "z.v2.png", "w.png"]
    for name, member in found.items():
        image = open_image(path, data.read_span(path, member.picture))
        assert image.getpixel((0, 0))[0] == members[name]
    assert found["2024.01.06.png"].json is not None
    assert found["a.b/x.png"].txt is None
    assert found["y.left.png"].txt == found["y.right.PNG"].txt is not None
    assert found["z.v2.png"].txt is not None
    assert found["z.png"].txt is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for words in (
        "9 pictures;",
        "2 hidden files",
        "1 further pictures of a sample",
        "a/x.mask.png",
    ):
        assert words in said
    assert "1 pictures beside another of their name" in said
    read_members(write_tar(tmp_path / "b.tar", {"x.png": b"", "x.txt": b"", "y.cls": b"1"}))
    assert capsys.readouterr().err == ""


def linked(archive: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    archive.addfile(info)


def put(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_links_are_what_they_lead_to(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        linked(archive, "d/early.png", "../x.png", tarfile.SYMTYPE)
        put(archive, "./x.png", encoded(7))
        linked(archive, "hard.png", "./x.png", tarfile.LNKTYPE)
        linked(archive, "twice.png", "hard.png", tarfile.SYMTYPE)
        put(archive, "x.txt", b"seven")
        linked(archive, "hard.txt", "x.txt", tarfile.LNKTYPE)
        linked(archive, "gone.png", "nowhere.png", tarfile.SYMTYPE)
        linked(archive, "out.png", "/etc/hostname", tarfile.SYMTYPE)
        linked(archive, "loop.png", "pool.png", tarfile.SYMTYPE)
        linked(archive, "pool.png", "loop.png", tarfile.SYMTYPE)
    found = {m.name: m for m in read_members(tmp_path / "a.tar")}
    assert list(found) == ["d/early.png", "x.png", "hard.png", "twice.png"]
    assert len({m.picture for m in found.values()}) == 1
    assert found["hard.png"].txt == found["x.png"].txt is not None
    assert "4 links to what the shard does not hold" in capsys.readouterr().err


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_joined_end_to_end_are_one(tmp_path, form, capsys):
    parts, long = [], "a" * 90 + "/" + "b" * 90
    for number in range(3):
        file = io.BytesIO()
        more = {"pax_headers": {"comment": "for all"}} if form == tarfile.PAX_FORMAT else {}
        with tarfile.open(fileobj=file, mode="w", format=form, **more) as archive:
            put(archive, f"{long}{number}.png", encoded(number))
            put(archive, f"\u00e9{number}.png", encoded(10 + number))
        parts.append(file.getvalue())
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    expected = [name for n in range(3) for name in (f"{long}{n}.png", f"\u00e9{n}.png")]
    assert names(tmp_path / "a.tar") == expected
    assert capsys.readouterr().err == ""
    for n, member in enumerate(read_members(tmp_path / "a.tar")):
        image = open_image("x", data.read_span(tmp_path / "a.tar", member.picture))
        assert image.getpixel((0, 0))[0] == n // 2 + 10 * (n % 2)
    (tmp_path / "bare.tar").write_bytes(parts[0][: len(parts[0].rstrip(b"\0")) // 512 * 512 + 512])
    assert names(tmp_path / "bare.tar") == expected[:2]  # no zeros at the end


def test_stretches_that_are_no_tar_are_counted(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", {f"{n}.png": encoded(n) for n in range(3)})
    content = bytearray(path.read_bytes())
    second = content.index(b"1.png")
    content[second + 150] ^= 1  # its checksum
    path.write_bytes(content)
    assert names(path) == ["0.png", "2.png"]
    assert f"1 stretches that are no tar ({path}, byte {second})" in capsys.readouterr().err
    path.write_bytes(path.read_bytes() + b"a footer")
    assert names(path) == ["0.png", "2.png"]
    assert "2 stretches that are no tar" in capsys.readouterr().err


def test_sparse_files_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", {"x.png": encoded(1)})
    info = tarfile.TarInfo("sparse.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (1 << 20, 512)  # where its data lie
    block[483:495] = b"%011o\0" % ((1 << 20) + 512)  # its size
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:512]))
    joined = bytes(block) + b"x" * 512 + (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(joined)
    assert names(tmp_path / "a.tar") == ["x.png"]
    assert "1 sparse files" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, -512, -(1 << 40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, b"g"])
def test_a_header_may_claim_any_size(tmp_path, size, kind):
    """Nothing of that size is allocated, nor is anything read for ever."""
    block = bytearray(tarfile.TarInfo("x.png").tobuf(tarfile.GNU_FORMAT))
    block[156:157] = kind
    block[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    block[124] = 0x80 if size > 0 else 0xFF
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:512]))
    (tmp_path / "a.tar").write_bytes(bytes(block) + encoded(1).ljust(1024, b"\0") + bytes(1024))
    with pytest.raises(DataError, match=r"(cannot read the shard|no picture to train on) .*a\.tar"):
        Shards([tmp_path / "a.tar"], (1, 1), 1, 0).at(0)


def test_what_is_no_tar_is_named(tmp_path):
    good = write_tar(tmp_path / "a.tar", {"x.png": encoded(1)}).read_bytes()
    os.mkfifo(tmp_path / "pipe.tar")
    cases = {"gz.tar": gzip.compress(good), "empty.tar": b"", "text.tar": b"no tar" * 999}
    cases |= {"cut.tar": good[:600], "head.tar": good[:300]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "pipe.tar", "nowhere.tar"):
        with pytest.raises(DataError, match=rf"cannot read the shard .*{name}"):
            read_members(tmp_path / name)


def test_images_beside_shards_are_counted(tmp_path, capsys):
    for name in ("0.tar", "1.tar", ".hidden.tar"):
        write_tar(tmp_path / name, {"x.png": encoded(1)})
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "class").mkdir()
    for n in range(3):
        (tmp_path / "class" / f"{n}.png").write_bytes(encoded(n))
    (tmp_path / "2.tar.gz").write_bytes(b"")
    source, _ = open_images(DataConfig(path=str(tmp_path)), 4, 0)
    assert source.describe() == "1 shards (3 images beside them are not read)"
    said = capsys.readouterr().err
    assert "3 images beside the shards, which alone are read" in said
    assert "1 .gz files" in said
    assert said.count("\n") == 1


# -- broken images ------------------------------------------------------------------------------


def test_another_image_stands_in_for_a_broken_one(tmp_path, capsys):
    members = {f"{n}.png": encoded(n) for n in range(10, 16)}
    members["12.png"] = members["12.png"][:40]  # cut off
    members["14.png"] = b"no image"
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", {"20.png": encoded(20)})
    own, other = (crops(tmp_path, streams=(1, 1), held_out=str(tmp_path)) for _ in range(2))
    seen = [level(own[g]) for g in range(70)]
    assert set(seen) == {10, 11, 13, 15, 20}
    said = capsys.readouterr().err
    assert "times another picture was taken for a broken one (cannot read the image" in said
    assert said.count("\n") < 8
    backwards = [level(other[g]) for g in reversed(range(70))]
    assert seen == backwards[::-1]
    _, held_out = open_images(DataConfig(path=str(tmp_path), held_out=str(tmp_path)), 4, 0)
    assert {level(c) for c in data.held_out_crops(held_out, 16, 100)} == {10, 11, 13, 15, 20}


def test_a_shard_without_a_whole_image_is_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": b"no image", "y.png": b"nor this"})
    own = Shards([tmp_path / "a.tar"], (1, 1), 1, 0)
    with pytest.raises(DataError, match=r"a\.tar/[xy]\.png.*nor can 2 others"):
        own.at(0)
    own.members(tmp_path / "a.tar")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.tar"):  # not the image's fault
        own.at(0)


def test_training_on_shards_resumes(micro, folder, tmp_path):
    settings = ("data.streams=[2, 1]", "data.weight_key=faces", "optim.steps=6")
    runs = [tmp_path / "whole", tmp_path / "halves"]
    for run in runs:
        tokenizer.main(micro.overrides(run, folder, *micro.PIXEL_ONLY, *settings))
    shutil.rmtree(checkpoint.available(runs[1] / "checkpoints")[-1])
    tokenizer.main([f"run={runs[1]}", "--resume"])
    micro.assert_same_end(*runs)
