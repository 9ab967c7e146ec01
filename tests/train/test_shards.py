"""Shards without captions for the tokenizer, weights, broken images."""

from __future__ import annotations

import collections
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import write_tar
from PIL import Image

from tokenflow_ext.train import checkpoint, data, tokenizer
from tokenflow_ext.train.config import ConfigError, DataConfig, load_config
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.images import open_images
from tokenflow_ext.train.pictures import to_tensor
from tokenflow_ext.train.shards import Shards


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
            own, share = crops(folder), data.Shard(8, 1, rank, world)
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
    batches = iter(data.loader(crops(folder), data.Shard(8), 16, workers))
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
        ('{"file_name": "../picture0.png", "weight": 1}', r"line 2.*outside the folder"),
        ('{"file_name": "/picture0.png", "weight": 1}', r"line 2.*outside the folder"),
        ('{"file_name": 3, "weight": 1}', r"line 2.*3"),
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
    with pytest.raises(
        ConfigError, match=r"data\.streams must be two positive numbers, got \[0, 1"
    ):
        load_config(None, ["data.streams=[0, 1]"])


def test_a_weight_that_is_no_number_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": encoded(1), "x.json": b'{"faces": "two"}'})
    own = Shards([tmp_path / "a.tar"], (1, 1), 1, 0, weight_key="faces")
    with pytest.raises(DataError, match=r"data\.weight_key=faces of .*a\.tar/x\.png.*'two'"):
        own.place(0)
    write_tar(tmp_path / "a.tar", {"x.png": encoded(1), "x.json": b'{"faces": 0}'})
    with pytest.raises(DataError, match=r"no picture to train on in .*a\.tar"):
        own.place(0)


# -- broken images ------------------------------------------------------------------------------


def test_another_image_stands_in_for_a_broken_one(tmp_path):
    members = {f"{n}.png": encoded(n) for n in range(10, 16)}
    members["12.png"] = members["12.png"][:40]  # cut off
    members["14.png"] = b"no image"
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", {"20.png": encoded(20)})
    own, other = (crops(tmp_path, streams=(1, 1), held_out=str(tmp_path)) for _ in range(2))
    seen = [level(own[g]) for g in range(70)]
    assert set(seen) == {10, 11, 13, 15, 20}
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
