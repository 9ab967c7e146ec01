"""Pictures with captions: forms, what becomes of captions, how shards are dealt out, the fetch."""

from __future__ import annotations

import collections
import errno
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import write_tar
from PIL import Image

from tokenflow_ext.train import data
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.cli.entry import main
from tokenflow_ext.train.config import CaptionConfig, ConfigError, load_text_config
from tokenflow_ext.train.data import captions, emojis, webdataset
from tokenflow_ext.train.data.captions import Captioned, Form, Pictures, Shards, Tokens
from tokenflow_ext.train.data.image_files import open_image
from tokenflow_ext.train.data.text_files import DataError

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
        share = data.BatchPartition(8, accumulate, rank, world)
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
        loader = iter(data.loader(pairs, data.BatchPartition(4), 8, workers, captions.collate))
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
        webdataset.read_members(shard)
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"cannot read the shard .*a\.tar"):
        webdataset.read_members(tmp_path / "a.tar")
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


# -- what is a caption ----------------------------------------------------------------------------


def folder_of(root: Path, described: dict[str, bytes], count: int = 2) -> Path:
    root.mkdir()
    for i in range(count):
        (root / f"{i}.png").write_bytes(encoded(i))
    for name, content in described.items():
        (root / name).write_bytes(content)
    return root


def entry(**keys) -> bytes:
    return json.dumps(keys, ensure_ascii=False).encode()


NONE = [
    ({}, "without a caption"),
    ({"txt": b""}, "with an empty caption"),
    ({"txt": b" \r\n\t\n"}, "with an empty caption"),
    ({"txt": b"\xef\xbb\xbf"}, "with an empty caption"),
    ({"txt": "\ufeff\ufeff\u200b".encode()}, "with an empty caption"),
    ({"txt": b"", "json": entry(caption=None)}, "with an empty caption"),
    ({"json": entry(caption="  \u2028", text="")}, "with an empty caption"),
    ({"json": entry(caption=["a", "b"])}, "whose caption is no text but a list"),
    ({"json": entry(caption={"en": "a"})}, "whose caption is no text but an object"),
    ({"json": entry(text=3.5)}, "whose text is no text but a number"),
    ({"json": entry(caption=False)}, "whose caption is no text but true or false"),
    ({"json": b"[1]"}, "whose JSON is no object but a list"),
    ({"json": b'{"caption": "a \\ud83c"}'}, "with half a surrogate pair in the caption"),
    ({"json": entry(TEXT="a cat")}, "without the key caption or text"),
]


@pytest.mark.parametrize(("described", "why"), NONE)
def test_no_caption_is_left_out_and_counted(tmp_path, capsys, described, why):
    """The same in folders and shards."""
    beside = {f"0.{suffix}": content for suffix, content in described.items()}
    folder = folder_of(tmp_path / "folder", {**beside, "1.txt": b"a dog"})
    pictures = Pictures(folder, 8)
    assert [caption for _, caption in pictures.pairs] == ["a dog"]
    assert f"1 pictures with captions; left out: 1 pictures {why} (" in capsys.readouterr().err
    listed = captions.list_captions(folder)
    assert list(listed.values()) == [None, "a dog"]
    capsys.readouterr()
    (tmp_path / "shards").mkdir()
    members = {"0.png": encoded(0), **beside, "1.png": encoded(1), "1.json": entry(text="a dog")}
    write_tar(tmp_path / "shards" / "0.tar", members)
    pairs = Captioned(tmp_path / "shards", FORM, CaptionConfig(drop=0.0, truncate=0.0), 2, 0)
    assert {pairs[g].caption for g in range(6)} == {"a dog"}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"left out so far: 1 pictures {why} (" in said
    # Where all are so, an error that says why.
    write_tar(tmp_path / "shards" / "0.tar", dict(list(members.items())[: 1 + len(beside)]))
    with pytest.raises(DataError, match=f"no picture with a caption in .*1 pictures {why}"):
        Captioned(tmp_path / "shards", FORM, CaptionConfig(), 2, 0)[0]
    (folder / "1.txt").write_bytes(b"")
    with pytest.raises(DataError, match=rf"has a caption .*\d pictures {why}"):
        Pictures(folder, 8)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"txt": b"\xef\xbb\xbfa cat\r\nmore"}, "a cat"),
        ({"txt": "\n\na cat\u2028on a mat\n".encode()}, "a cat\u2028on a mat"),
        ({"txt": b"a cat", "json": entry(caption="no")}, "a cat"),
        ({"txt": b"\xef\xbb\xbf\n", "json": entry(caption=" a cat ")}, "a cat"),
        ({"json": entry(caption=None, text="a cat")}, "a cat"),
        ({"json": entry(caption=["no"], text="a cat")}, "a cat"),
        ({"json": b"\xef\xbb\xbf" + entry(text="a cat\x85.")}, "a cat\x85."),
        ({"json": entry(text="\u4e00\u53ea\u732b")}, "\u4e00\u53ea\u732b"),
        ({"txt": "\U0001f351".encode()}, "\U0001f351"),
    ],
)
def test_captions_of_folders_and_shards(tmp_path, described, expected):
    beside = {f"0.{suffix}": content for suffix, content in described.items()}
    folder = folder_of(tmp_path / "folder", beside, 1)
    assert Pictures(folder, 8)[0].caption == expected
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", {**beside, "0.png": encoded(0)})
    pairs = Captioned(tmp_path / "shards", FORM, CaptionConfig(drop=0.0, truncate=0.0), 2, 0)
    assert pairs[0].caption == expected


def test_the_keys_of_a_caption_can_be_named(tmp_path):
    rows = [{"file_name": f"{i}.png", "TEXT": f"cat {i}", "url": "u"} for i in range(2)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    folder = folder_of(tmp_path / "folder", {"metadata.jsonl": lines})
    shard = tmp_path / "shards"
    shard.mkdir()
    write_tar(shard / "0.tar", {"0.png": encoded(0), "0.json": entry(TEXT="cat 0", url="u")})
    for place in (folder, shard):
        with pytest.raises(DataError, match=r"keys TEXT, url: .*data\.caption_keys=\[KEY\]"):
            Captioned(place, FORM, CaptionConfig(), 2, 0)[0]
        config = load_text_config(None, ["data.caption_keys=[prompt, TEXT]", "data.drop=0"]).data
        assert Captioned(place, FORM, config, 2, 0)[0].caption.startswith("cat")
    for none in ("['']", "[]"):
        with pytest.raises(ConfigError, match=r"data\.caption_keys must name keys"):
            load_text_config(None, [f"data.caption_keys={none}"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.txt", "a cat".encode("utf-16"), r"0\.txt is not UTF-8 but UTF-16"),
        ("0.txt", b"one\ncaf\xe9", r"0\.txt, line 2: byte 0xe9"),
        ("0.json", b"{", r"0\.json is not JSON"),
        ("0.json", b"[" * 99999, r"0\.json is nested too deeply"),
        (
            "metadata.jsonl",
            entry(file_name="0.png", text="\u2019").decode().encode("cp1252"),
            "0x92",
        ),
        ("metadata.jsonl", b'{"file_name": "0.png"}\n\n{"file_name": 3}', "line 3: .*3"),
        ("metadata.jsonl", entry(text="a"), "line 1: .*no file_name"),
        ("metadata.jsonl", entry(file_name="../0.png", text="a"), "line 1: .*not below"),
        ("metadata.jsonl", entry(file_name="a/../../0.png", text="a"), "line 1: .*not below"),
        ("metadata.jsonl", entry(file_name="/etc/0.png", text="a"), "line 1: .*/etc/0.png"),
        ("metadata.jsonl", b"", "names no picture"),
        ("metadata.jsonl", b"\xef\xbb\xbf\n\n", "names no picture"),
    ],
)
def test_descriptions_that_cannot_be_read_are_named(tmp_path, name, content, message):
    folder = folder_of(tmp_path / "folder", {"1.txt": b"a dog", name: content})
    with pytest.raises(DataError, match=message) as error:
        Pictures(folder, 8)
    assert len(str(error.value)) < 400 + len(str(folder))


def test_descriptions_in_shards_that_cannot_be_read_are_counted(tmp_path, capsys):
    members = {f"{i}.png": encoded(i) for i in range(5)}
    members |= {"0.txt": "a cat".encode("utf-16"), "1.txt": b"caf\xe9", "2.json": b"{"}
    members |= {"3.json": b"[" * 99999, "4.txt": b"a dog"}
    write_tar(tmp_path / "0.tar", members)
    pairs = Captioned(tmp_path, FORM, CaptionConfig(drop=0.0), 2, 0)
    assert {pairs[g].caption for g in range(4)} == {"a dog"}
    said = capsys.readouterr().err
    assert "2 pictures whose description is not UTF-8" in said
    assert "2 pictures whose description is not JSON" in said


def test_a_listing_counts_what_it_does_not_name(tmp_path, capsys):
    rows = [("0.png", "old"), ("0.png", "new"), ("gone.png", "gone"), ("link/x.png", "linked")]
    lines = "\r\n".join(json.dumps({"file_name": f, "text": t}) for f, t in rows).encode()
    folder = folder_of(tmp_path / "folder", {"metadata.jsonl": lines}, 3)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(encoded(1))
    (folder / "link").symlink_to(tmp_path / "elsewhere")  # its owner's wish
    assert [caption for _, caption in Pictures(folder, 8).pairs] == ["new", "linked"]
    said = capsys.readouterr().err
    assert "2 images that it does not name" in said
    assert "1 lines replaced by a later one" in said
    assert "1 pictures that are named but not there" in said


def test_names_of_any_length(tmp_path):
    """NAME.json may be too long where NAME.png is not, and a listing may name anything."""
    folder = folder_of(tmp_path / "folder", {"1.txt": b"a dog"})
    (folder / f"{'x' * 251}.png").write_bytes(encoded(1))
    (folder / f"{'x' * 251}.txt").write_bytes(b"an x")
    (folder / f"{'y' * 251}.png").write_bytes(encoded(1))
    assert [caption for _, caption in Pictures(folder, 8).pairs] == ["a dog", "an x"]
    rows = [{"file_name": f"{'z' * 9999}.png", "text": "z"}, {"file_name": "0.png", "text": "0"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [caption for _, caption in Pictures(folder, 8).pairs] == ["0"]


def test_pipes_beside_pictures_are_not_waited_on(tmp_path):
    folder = folder_of(tmp_path / "folder", {"1.txt": b"a dog"})
    os.mkfifo(folder / "0.txt")
    os.mkfifo(folder / "0.json")
    assert [caption for _, caption in Pictures(folder, 8).pairs] == ["a dog"]
    os.mkfifo(folder / "metadata.jsonl")
    with pytest.raises(DataError, match=r"metadata\.jsonl is no file but a pipe"):
        Pictures(folder, 8)


def test_tokenize_takes_the_keys_of_captions(image_tokenizer, tmp_path, capsys):
    described = {"0.json": entry(TEXT="a cat"), "1.txt": b""}
    folder, out = folder_of(tmp_path / "folder", described), tmp_path / "out"
    words = ["tokenize", str(folder), "--checkpoint", str(image_tokenizer), "--out", str(out)]
    main([*words, "--caption-keys", "prompt", "TEXT"])
    rows = json.loads((out / "tokens-00000.json").read_text())
    assert [row["caption"] for row in rows] == ["a cat", None]
    said = capsys.readouterr().err
    assert "1 pictures with captions, but: 1 pictures with an empty caption" in said


def test_decoded_pairs_are_bounded_in_bytes(tmp_path):
    folder = folder_of(tmp_path / "folder", {f"{i}.txt": b"a" for i in range(4)}, 4)
    for mib, kept in ((0, 0), (1, 1), (2, 2), (9, 4)):  # each takes 3/4 MiB
        pictures = Pictures(folder, 256, cache=mib)
        first = [pictures[i].picture for i in range(4)]
        assert sum(pictures[i].picture is first[i] for i in range(4)) == kept
        assert all(torch.equal(pictures[i].picture, first[i]) for i in range(4))


@pytest.fixture
def tokens(micro, image_tokenizer, tmp_path) -> Path:
    """What `tokenflow tokenize` makes of three pictures, one without a caption."""
    images = micro.draw_images(tmp_path / "images")
    (images / "picture0.txt").write_text("Waves.")
    (images / "picture2.txt").write_text("More waves.")
    out = tmp_path / "tokens"
    tokenize(str(images), str(image_tokenizer), str(out), batch_size=2, shard_size=2)
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
        main(["fetch-emoji", str(folder), "--tarball", str(package)])
    monkeypatch.setattr(emojis.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="npm is not installed"):
        main(["fetch-emoji", str(folder)])
    monkeypatch.setattr(emojis, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    main(["fetch-emoji", str(folder), "--tarball", str(package)])
    assert "3 pictures" in capsys.readouterr().out
    main(["fetch-emoji", str(folder)])  # already there: nothing is fetched
    assert "already" in capsys.readouterr().out


def test_fetched_pictures_take_no_other_files_place(package, tmp_path, monkeypatch):
    monkeypatch.setattr(emojis, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    given = ["--tarball", str(package)]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "1f600.webp").write_bytes(b"mine")
    for more in (given, []):
        with pytest.raises(SystemExit, match=r"holds other things, such as 1f600\.webp"):
            main(["fetch-emoji", str(mine), *more])
    assert [path.read_bytes() for path in mine.iterdir()] == [b"mine"]
    with pytest.raises(SystemExit, match=r"cannot write into .* is no folder"):
        main(["fetch-emoji", str(package), *given])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit, match=r"cannot read .*pipe"):
        main(["fetch-emoji", str(tmp_path / "new"), "--tarball", str(tmp_path / "pipe")])

    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SystemExit, match=r"cannot write .*/new: No space left"):
            main(["fetch-emoji", str(tmp_path / "new"), *given])
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "new").mkdir()
    main(["fetch-emoji", str(tmp_path / "new"), *given, "--skin-tones"])
    with pytest.raises(SystemExit, match="already holds pictures, with variants by skin tone"):
        main(["fetch-emoji", str(tmp_path / "new")])


def test_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    pytest.importorskip("emoji")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such registry' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(emojis.shutil, "which", lambda _: str(npm))
    with pytest.raises(DataError, match="no such registry"):
        emojis.fetch(tmp_path / "emoji")
