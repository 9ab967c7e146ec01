"""Pictures with captions: forms, what becomes of captions, how shards are dealt out, the fetch."""

from __future__ import annotations

import collections
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import write_tar
from PIL import Image

from tokenflow_ext.train import captions, cli, data, emojis
from tokenflow_ext.train import shards as tars
from tokenflow_ext.train.captions import Captioned, Form, Pictures, Shards, Tokens
from tokenflow_ext.train.config import CaptionConfig
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.pictures import open_image

FORM = Form(image_size=8, scales=[(1, 1), (2, 2)], codebook_size=16)


def encoded(value: int, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, (12, 8), value if mode == "L" else (value,) * len(mode)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """8 shards of 3 to 5 samples; the caption of sample n is "n", its picture has the value n."""
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for shard in range(8):
        members = {"README": b"not a sample"}
        for _ in range(3 + shard % 3):
            key = f"part/{number:03d}"
            members[f"{key}.png"] = encoded(number)
            if number % 2:
                members[f"{key}.json"] = json.dumps({"caption": str(number)}).encode()
            else:
                members[f"{key}.txt"] = f"{number}\nanother line\n".encode()
            number += 1
        members["lonely.png"] = encoded(0)
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def test_first_sentence():
    assert captions.first_sentence("A cat. It sleeps.") == "A cat."
    assert captions.first_sentence("A cat of 3.5 kg sleeps") == "A cat of 3.5 kg sleeps"
    assert captions.first_sentence('It says "Hi!" Then leaves.') == 'It says "Hi!"'
    assert captions.first_sentence("一只猫。它在睡觉。") == "一只猫。"
    assert captions.first_sentence("") == ""


def test_shares_of_dropped_and_cut_captions():
    config, text = CaptionConfig(), "One. Two."
    seen = [captions.vary(text, config, 7, i) for i in range(4000)]
    counts = collections.Counter(seen)
    assert set(counts) == {"", "One.", text}
    assert counts[""] == pytest.approx(400, abs=4 * (4000 * 0.1 * 0.9) ** 0.5)
    assert counts["One."] == pytest.approx(720, abs=4 * (4000 * 0.18 * 0.82) ** 0.5)
    assert seen == [captions.vary(text, config, 7, i) for i in range(4000)]
    assert seen != [captions.vary(text, config, 8, i) for i in range(4000)]
    never = CaptionConfig(drop=0.0, truncate=0.0)
    assert {captions.vary(text, never, 7, i) for i in range(100)} == {text}
    assert {captions.vary(text, CaptionConfig(drop=1.0), 7, i) for i in range(100)} == {""}


def test_a_folder_with_text_files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(encoded(ord(name)))
    (tmp_path / "a.txt").write_text("  An a.  \nmore\n")
    (tmp_path / "c.txt").write_text("A c.")
    pictures = Pictures(tmp_path, 8)
    assert [pictures[i].caption for i in range(len(pictures))] == ["An a.", "A c."]
    assert pictures[0].picture.shape == (3, 8, 8)
    assert pictures[1].picture.mean() == pytest.approx(ord("c") / 127.5 - 1, abs=1e-5)


def test_a_folder_with_metadata(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded(9))
    lines = ['{"file_name": "in/a.png", "text": "An a."}', '{"file_name": "b.png", "caption": " "}']
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(lines))
    assert [c for _, c in Pictures(tmp_path, 8).pairs] == ["An a."]
    (tmp_path / "metadata.jsonl").write_text('{"file": "b.png"}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1"):
        Pictures(tmp_path, 8)


def test_transparent_parts_are_white(tmp_path):
    image = np.zeros((4, 4, 4), np.uint8)
    image[:, 2:] = [200, 0, 0, 255]
    for name, mode in (("a.png", "RGBA"), ("a.webp", "RGBA"), ("b.png", "P")):
        Image.fromarray(image).convert(mode).save(tmp_path / name, lossless=True)
        made = np.asarray(open_image(tmp_path / name))
        assert (made[:, :2] == 255).all()
        assert np.abs(made[:, 2:].astype(int) - [200, 0, 0]).max() < 8  # a palette rounds


def test_every_round_of_a_folder_visits_each_once(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    config = CaptionConfig(drop=0.0)
    pairs = Captioned(tmp_path, FORM, config, 4, seed=1)
    rounds = [[pairs[g].caption for g in range(7 * k, 7 * k + 7)] for k in range(3)]
    assert all(len(set(r)) == 7 for r in rounds)
    assert rounds[0] != rounds[1]
    again = Captioned(tmp_path, FORM, config, 8, seed=1)  # another batch, from the middle on
    assert [again[g].caption for g in range(9, 21)] == (rounds[1] + rounds[2])[2:]
    few = Captioned(tmp_path, FORM, CaptionConfig(limit=3), 8, seed=1)
    assert [caption for _, caption in few.source.pairs] == ["number 0", "number 2", "number 4"]


def test_pairs_are_chosen_by_caption(tmp_path):
    for i, name in enumerate(["red circle", "blue circle", "red square", "blue square", "a duck"]):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
        (tmp_path / f"{i}.txt").write_text(name)

    def chosen(**settings) -> list[str]:
        pictures = Pictures(tmp_path, 8, captions.Choice(**settings))
        return [caption for _, caption in pictures.pairs]

    shapes = "(red|blue) (circle|square)"
    assert chosen(match="red.*") == ["red circle", "red square"]
    assert chosen(match=shapes, unseen="red square") == ["red circle", "blue circle", "blue square"]
    assert chosen(match=shapes, unseen="red square|a duck", held_out=True) == ["red square"]
    assert chosen(unseen="blue.*", limit=2) == ["red circle", "red square"]
    with pytest.raises(DataError, match="leave none of 5 captions to train with"):
        chosen(match="red")  # a whole caption is meant, not a part of it
    with pytest.raises(DataError, match="to hold out"):
        chosen(match="red.*", unseen="blue.*", held_out=True)
    # Every caption is in one of the two.
    both = chosen(unseen=".*square"), chosen(unseen=".*square", held_out=True)
    assert sorted(both[0] + both[1]) == sorted(chosen())


def test_shards_are_not_chosen_from(shards):
    with pytest.raises(DataError, match="not for shards"):
        Captioned(shards, FORM, CaptionConfig(match="a.*"), 4, seed=0)


def test_members_of_a_shard(shards):
    first = sorted(shards.glob("*.tar"))[0]
    reader = Shards(shards, 8, (1, 1), 4, seed=0)
    assert [m.name for m in reader.members(first)] == [f"part/00{i}.png" for i in range(3)]
    sample = reader.read(sorted(shards.glob("*.tar"))[1], 2)
    assert sample.caption == "5"
    assert sample.picture.mean() == pytest.approx(5 / 127.5 - 1, abs=1e-5)
    assert [s.caption for s in reader.some(100)[:5]] == ["0", "1", "2", "3", "4"]
    assert [s.caption for s in reader.some(3)] == ["0", "1", "2"]


def taken(shards: Path, world: int, start: int, steps: int, streams=(2, 2), accumulate=1):
    """The captions of each step, joined over processes; and the shards each process opened."""
    steps_seen, opened = [], []
    for rank in range(world):
        share = data.Shard(8, accumulate, rank, world)
        config = CaptionConfig(drop=0.0, truncate=0.0, streams=streams)
        pairs = Captioned(shards, FORM, config, 8 // accumulate, seed=3)
        seen = [
            [pairs[g].caption for g in share.indices(8 * step, micro)]
            for step in range(start, start + steps)
            for micro in range(accumulate)
        ]
        steps_seen.append(seen)
        opened.append(pairs.source.opened)
    batches = [[c for seen in steps_seen for c in seen[i]] for i in range(steps * accumulate)]
    return batches, opened


def test_shards_are_split_over_processes_and_resumable(shards):
    alone, _ = taken(shards, 1, 0, 12)
    pair, opened = taken(shards, 2, 0, 12)
    assert alone == pair
    assert not opened[0] & opened[1]
    assert opened[0] | opened[1] == set(shards.glob("*.tar"))
    later, _ = taken(shards, 2, 5, 7)
    assert later == alone[5:]
    # Four processes still see the same samples, though two of them share each stream.
    assert taken(shards, 4, 0, 12)[0] == alone


def test_workers_read_shards_of_their_own(shards):
    pairs = Captioned(shards, FORM, CaptionConfig(streams=(2, 2)), 8, seed=3)
    by_worker = [
        {pairs.source.place(8 * n + j)[0] for n in range(w, 24, 2) for j in range(8)}
        for w in range(2)
    ]
    assert not by_worker[0] & by_worker[1]


def test_a_round_of_a_stream_visits_each_sample_once(shards):
    everything = Captioned(
        shards, FORM, CaptionConfig(drop=0.0, truncate=0.0, streams=(1, 1)), 4, 0
    )
    total = sum(len(everything.source.members(p)) for p in shards.glob("*.tar"))
    rounds = [[everything[g].caption for g in range(total * k, total * (k + 1))] for k in (0, 1)]
    assert sorted(map(int, rounds[0])) == sorted(map(int, rounds[1])) == list(range(total))
    assert rounds[0] != rounds[1]


def test_the_loader_gives_the_same_with_workers(shards):
    def batches(workers: int) -> list[list[str]]:
        pairs = Captioned(shards, FORM, CaptionConfig(streams=(1, 2)), 4, seed=3)
        loader = iter(data.loader(pairs, data.Shard(4), 8, workers, captions.collate))
        return [next(loader)[1] for _ in range(6)]

    assert batches(0) == batches(2)


@pytest.mark.parametrize(
    ("streams", "message"), [((3, 1), "must divide"), ((4, 4), "8 shards, too few")]
)
def test_streams_that_do_not_fit(shards, streams, message):
    with pytest.raises(DataError, match=message):
        Captioned(shards, FORM, CaptionConfig(streams=streams), 8, seed=0)


def test_broken_shards_are_named(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"x.png": bytes(5000), "x.txt": b"x"})
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"cannot read the shard .*a\.tar.*unexpected end"):
        tars.read_members(shard)
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"cannot read the shard .*a\.tar"):
        tars.read_members(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", {"x.png": b"no picture", "x.txt": b"x", "y.png": encoded(1)})
    pairs = Captioned(tmp_path, FORM, CaptionConfig(), 4, seed=0)
    with pytest.raises(DataError, match=r"a\.tar/x\.png"):
        pairs[0]
    write_tar(tmp_path / "a.tar", {"y.png": encoded(1)})
    with pytest.raises(DataError, match="no picture with a caption"):
        Captioned(tmp_path, FORM, CaptionConfig(), 4, seed=0)[0]
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match="compressed"):
        Captioned(tmp_path, FORM, CaptionConfig(), 4, seed=0)


@pytest.fixture
def tokens(micro, image_tokenizer, tmp_path) -> Path:
    """What `tokenflow tokenize` makes of three pictures, one without a caption."""
    images = micro.draw_images(tmp_path / "images")
    (images / "picture0.txt").write_text("Waves.")
    (images / "picture2.txt").write_text("More waves.")
    out = tmp_path / "tokens"
    cli.tokenize(str(images), str(image_tokenizer), str(out), batch=2, shard=2)
    return out


def test_tokens_of_tokenize_are_read(tokens):
    scales = [(1, 1), (2, 2), (4, 4)]
    rows = Tokens(tokens, scales, 64)
    assert [rows[i].caption for i in range(len(rows))] == ["Waves.", "More waves."]
    assert rows[0].picture.dtype == torch.int64
    assert rows[0].picture.shape == (21,)
    with pytest.raises(DataError, match="scales"):
        Tokens(tokens, scales[:2], 64)
    with pytest.raises(DataError, match="64 codes"):
        Tokens(tokens, scales, 32)
    (tokens / "tokens-00001.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="cannot read"):
        Tokens(tokens, scales, 64)


# -- the emojis ---------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path) -> Path:
    """A small package in the form of npm's: a few pictures and what must be passed over."""
    pytest.importorskip("emoji")
    path = tmp_path / "package.tgz"
    files = {
        "package/package.json": b"{}",
        "package/assets/1f600.webp": encoded(1),
        "package/assets/0023-fe0f-20e3.webp": encoded(2),
        "package/assets/1f44d-1f3fb.webp": encoded(3),
        "package/assets/e999.webp": encoded(4),
        "package/assets/unnamed.webp": encoded(5),
        "package/assets/../../1f680.webp": encoded(6),
        "package/assets/1f63a.png": encoded(7),
    }
    return write_tar(path, files)


def test_emojis_are_named_by_their_code_points(package, tmp_path):
    folder = tmp_path / "emoji"
    assert emojis.unpack(package, folder) == 3
    expected = {"1f600.webp": "grinning face", "0023-fe0f-20e3.webp": "keycap #"}
    expected["1f680.webp"] = "rocket"  # written inside the folder, wherever the archive says
    found = {p.name: c for p, c in captions.list_captions(folder).items()}
    assert found == expected
    assert not (tmp_path / "1f680.webp").exists()
    assert (folder / "1f600.webp").read_bytes() == encoded(1)
    assert "MIT" in (folder / "LICENCES.txt").read_text()
    assert emojis.unpack(package, tmp_path / "toned", skin_tones=True) == 4


def test_fetching_says_what_is_missing(package, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "emoji"
    with pytest.raises(SystemExit, match="is not @lobehub"):
        cli.main(["fetch-emoji", str(folder), "--tarball", str(package)])
    monkeypatch.setattr(emojis.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="npm is not installed"):
        cli.main(["fetch-emoji", str(folder)])
    monkeypatch.setattr(emojis, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    cli.main(["fetch-emoji", str(folder), "--tarball", str(package)])
    assert "3 pictures" in capsys.readouterr().out
    cli.main(["fetch-emoji", str(folder)])  # already there: nothing is fetched
    assert "already" in capsys.readouterr().out


def test_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    pytest.importorskip("emoji")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such registry' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(emojis.shutil, "which", lambda _: str(npm))
    with pytest.raises(DataError, match="no such registry"):
        emojis.fetch(tmp_path / "emoji")
