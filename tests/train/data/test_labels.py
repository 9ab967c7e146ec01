"""Pictures with classes: folders of classes, metadata, shards, tokens; crops; what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import LabelConfig
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.captions import Form
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.data.labels import Classes, Labelled, collate, find_label

FORM = Form(32, [(1, 1), (2, 2), (4, 4)], 64)


def labelled(path, *, classes=None, count=0, joint=4, seed=0, **config):
    return Labelled(path, FORM, LabelConfig(path=str(path), **config), joint, seed, classes, count)


def encoded(value: int, side: int = 24) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side), (value,) * 3).save(content, "PNG")
    return content.getvalue()


def plain(folder: Path, *names: str) -> Path:
    """Grey pictures, the n-th of level n."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(number))
    return folder


def level(picture) -> int:
    return round((picture.mean().item() + 1) * 127.5)


# -- labels and classes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "name", "label", "why"),
    [
        (None, "cat/1.png", "cat", ""),
        (None, "cat/young/1.png", "cat", ""),  # the first folder
        ({}, "cat/1.png", "cat", ""),
        ({"label": "dog"}, "cat/1.png", "dog", ""),
        ({"label": 3}, "1.png", "3", ""),
        ({"label": None, "class": " dog "}, "1.png", "dog", ""),
        ({"label": True}, "cat/1.png", "", "neither"),
        ({"label": [1]}, "cat/1.png", "", "neither"),
        ({"label": 1.0}, "cat/1.png", "", "neither"),
        ({"label": " "}, "cat/1.png", "", "empty label"),
        (None, "1.png", "", "no folder of a class"),
    ],
)
def test_where_a_label_comes_from(entry, name, label, why):
    found, reason = find_label(entry, ("label", "class"), name)
    assert found == label
    assert why in reason
    assert bool(found) != bool(reason)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1)))
def test_classes_are_numbered_by_name(names):
    if not names or all(name.isascii() and name.isdigit() for name in names):
        return
    classes = Classes.of(names)
    assert list(classes.names) == sorted(set(names))
    assert [classes.number(name) for name in classes.names] == list(range(classes.count))


def test_numbers_stay_what_they_are():
    classes = Classes.of(["7", "0", "10", "7"])
    assert (classes.count, classes.names) == (11, ())
    assert classes.number("10") == 10
    for wrong in ("11", "-1", "x", "1.0", "٣"):
        with pytest.raises(DataError, match="none of the 11"):
            classes.number(wrong)


def test_a_file_of_names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("zebra\n\nant\nfox \n")
    classes = Classes.read(file)
    assert classes.names == ("zebra", "ant", "fox")
    assert [classes.number(x) for x in ("zebra", "ant", "fox", "2", "0")] == [0, 1, 2, 2, 0]
    with pytest.raises(DataError, match="'bee' is none of the 3"):
        classes.number("bee")
    # Without a file a number is no name's number.
    with pytest.raises(DataError, match="'1' is none"):
        Classes.of(["a", "b"]).number("1")
    file.write_text("a\na\n")
    with pytest.raises(DataError, match="'a' twice"):
        Classes.read(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="names no class"):
        Classes.read(file)


# -- folders --------------------------------------------------------------------------------------


def test_folders_are_classes(tmp_path, capsys):
    plain(tmp_path, "b/1.png", "b/deep/2.png", "a/3.png", "loose.png")
    found = labelled(tmp_path)
    assert found.classes.names == ("a", "b")
    assert "3 pictures with classes; left out: 1 pictures in no folder" in capsys.readouterr().err
    assert found.describe() == "3 pictures of 2 classes"
    seen = [found[i] for i in range(6)]
    for turn in (seen[:3], seen[3:]):  # each once a round
        assert sorted((level(s.picture), s.label) for s in turn) == [(0, 1), (1, 1), (2, 0)]
    again = labelled(tmp_path)
    assert all(torch.equal(again[i].picture, seen[i].picture) for i in (5, 0, 3))
    pictures, classes = collate(seen)
    assert pictures.shape == (6, 3, 32, 32)
    assert classes.dtype == torch.int64


def test_metadata_says_the_class(tmp_path):
    plain(tmp_path, "x/0.png", "x/1.png", "2.png")
    lines = [{"file_name": "x/0.png", "label": 4}, {"file_name": "2.png", "class": "1"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"'x' is none of the 5"):
        labelled(tmp_path, classes=Classes(5))
    lines.append({"file_name": "x/1.png", "label": 0})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = labelled(tmp_path)
    assert (found.classes.count, found.classes.names) == (5, ())
    assert sorted((level(s.picture), s.label) for s in found.some(0)) == [(0, 4), (1, 0), (2, 1)]
    assert labelled(tmp_path, count=9).classes.count == 9
    with pytest.raises(DataError, match=r"model\.classes is 2, and there are 5"):
        labelled(tmp_path, count=2)


def test_without_a_class(tmp_path):
    plain(tmp_path, "0.png")
    with pytest.raises(DataError, match=r"no picture below .* has a class"):
        labelled(tmp_path)
    lines = [{"file_name": "0.png", "label": [1]}, {"file_name": "a/1.png", "label": ""}]
    plain(tmp_path, "0.png", "a/1.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"1 pictures whose label is neither .* 1 .*empty label"):
        labelled(tmp_path)  # what is wrong does not fall back to the folder
    with pytest.raises(DataError, match="no folder at"):
        labelled(tmp_path / "nowhere")


def test_random_squares(tmp_path):
    """Every pixel's colour says where it was."""
    y, x = np.mgrid[0:60, 0:80]
    pixels = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    found = labelled(tmp_path, resize=1.5)  # 48 rows of 64, of which 32 x 32 are cut
    corners = set()
    for i in range(40):
        cut = (found[i].picture + 1) * 127.5
        assert cut.shape == (3, 32, 32)
        step = (cut[0, :, 1:] - cut[0, :, :-1]).mean().item()
        assert step == pytest.approx(80 / 64, rel=0.05)
        corners.add((round(cut[0, 0, 0].item()), round(cut[1, 0, 0].item())))
    assert len(corners) > 20
    assert {c[0] > 20 for c in corners} == {c[1] > 10 for c in corners} == {True, False}
    again = labelled(tmp_path, resize=1.5)
    assert torch.equal(found[7].picture, again[7].picture)
    # The evaluation looks at the middle.
    assert torch.equal(found.some(1)[0].picture, read_square(tmp_path / "a" / "0.png", 32))
    whole = labelled(tmp_path)
    assert torch.equal(whole[3].picture, read_square(tmp_path / "a" / "0.png", 32))
    flipped = labelled(tmp_path, flip=True)
    mirrored = [torch.equal(flipped[i].picture, whole[0].picture.flip(-1)) for i in range(30)]
    assert 5 < sum(mirrored) < 25


# -- shards ---------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two shards; picture n is of class n % 3, said in one of three ways, and one has none."""
    root = tmp_path / "shards"
    root.mkdir()
    for shard in range(2):
        members = {}
        for i in range(6):
            number, name = 6 * shard + i, f"{6 * shard + i:03d}"
            if i < 2:
                members |= {f"{name}.png": encoded(number), f"{name}.cls": b"%d\n" % (number % 3)}
            elif i < 4:
                members |= {
                    f"{name}.png": encoded(number),
                    f"{name}.json": json.dumps({"label": number % 3}).encode(),
                }
            else:
                members[f"{number % 3}/{name}.png"] = encoded(number)
        members["bare.png"] = encoded(200)
        write_tar(root / f"{shard}.tar", members)
    return root


def test_shards(shards, capsys):
    found = labelled(shards, count=3)
    for turn in range(2):
        seen = [found[12 * turn + i] for i in range(12)]
        assert sorted(level(s.picture) for s in seen) == list(range(12))
        assert all(s.label == level(s.picture) % 3 for s in seen)
    assert "in no folder of a class" in capsys.readouterr().err
    assert found.describe() == "2 shards, 3 classes"
    some = found.some(4)
    assert len(some) == 4
    assert all(s.label == level(s.picture) % 3 for s in some)
    with pytest.raises(DataError, match="how many classes the shards"):
        labelled(shards)
    with pytest.raises(DataError, match="none of the 2"):
        [labelled(shards, count=2)[i] for i in range(12)]


@pytest.mark.parametrize(
    ("description", "why"),
    [
        ({"1.cls": b"\xff2"}, "whose class is not UTF-8"),
        ({"1.json": b'{"label": "\xff"}'}, "whose JSON is not UTF-8"),
        ({"1.json": b'{"label": 2'}, "whose description is not JSON"),
        ({"1.json": b"[" * 100_000}, "whose description is not JSON"),
        ({"1.cls": b" \n", "1.json": b'{"label": 2}'}, "with an empty .cls"),
    ],
)
def test_classes_of_shards_that_cannot_be_read(tmp_path, capsys, description, why):
    """They are left out and counted; the others are read."""
    good = {"0.png": encoded(0), "0.cls": b"2"}
    write_tar(tmp_path / "0.tar", good | {"1.png": encoded(1)} | description)
    found = labelled(tmp_path, count=3)
    assert [(level(s.picture), s.label) for s in (found[0], found[1])] == [(0, 2), (0, 2)]
    assert f"1 pictures {why}" in " ".join(capsys.readouterr().err.split())


def test_named_shards(tmp_path):
    write_tar(tmp_path / "0.tar", {"ant/0.png": encoded(0), "bee/1.png": encoded(1)})
    names = tmp_path / "names.txt"
    names.write_text("bee\nant\n")
    config = LabelConfig(path=str(tmp_path), classes=str(names))
    found = Labelled(tmp_path, FORM, config, 2, 0)
    assert sorted((level(s.picture), s.label) for s in (found[0], found[1])) == [(0, 1), (1, 0)]


# -- tokens ---------------------------------------------------------------------------------------


def test_tokens_keep_their_classes(tmp_path, image_tokenizer):
    pictures = plain(tmp_path / "pictures", "b/0.png", "a/1.png", "x/2.png", "3.png")
    lines = [{"file_name": n} for n in ("b/0.png", "a/1.png", "3.png")]
    lines.append({"file_name": "x/2.png", "label": "b"})
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenize(str(pictures), str(image_tokenizer), str(tmp_path / "tokens"))
    rows = json.loads((tmp_path / "tokens" / "tokens-00000.json").read_text())
    assert {row["image"]: row.get("label") for row in rows} == {
        "3.png": None,
        "a/1.png": None,
        "b/0.png": None,
        "x/2.png": "b",
    }  # fmt: skip  (the others' are in their names)
    found = labelled(tmp_path / "tokens")
    assert found.tokenized
    assert found.classes.names == ("a", "b")
    assert found.describe() == "3 tokenized pictures of 2 classes"
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    by_row = {row["image"]: i for i, row in enumerate(rows) if row["image"] != "3.png"}
    assert len(by_row) == 3
    for sample in found.some(0):
        assert sample.picture.dtype == torch.int64
    expected = tokenizer.encode(read_square(pictures / "x" / "2.png", 32)[None])[0]
    assert any(torch.equal(s.picture, expected) and s.label == 1 for s in found.some(0))
    with pytest.raises(DataError, match=r"data\.resize and data\.flip are for pictures"):
        labelled(tmp_path / "tokens", flip=True)
    # A changed label is other data.
    lines[-1]["label"] = "a"
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(Exception, match="of other pictures"):
        tokenize(str(pictures), str(image_tokenizer), str(tmp_path / "tokens"))


def test_a_caption_may_be_the_class(pairs, image_tokenizer, tmp_path):
    tokenize(str(pairs), str(image_tokenizer), str(tmp_path / "tokens"))
    found = labelled(tmp_path / "tokens", label_keys=("caption",))
    assert found.classes.count == 12
    assert found.classes.names[0] == "A black disc. On grey."
    with pytest.raises(DataError, match="no row of the tokens"):
        labelled(tmp_path / "tokens")
