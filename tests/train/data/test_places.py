"""Local paths and URLs: the same data from a folder, a web server and a bucket, also resumed."""

from __future__ import annotations

import shutil
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from archives import write_tar
from loopback import serve

from tokenflow_ext.errors import MissingPackageError
from tokenflow_ext.train import tokenizer
from tokenflow_ext.train.config import CaptionConfig, DataConfig, LabelConfig
from tokenflow_ext.train.data import captions, crops, images, labels, places, webdataset
from tokenflow_ext.train.data.text_files import DataError
from tokenflow_ext.train.engine import checkpoint

FORM = captions.Form(32, [(1, 1), (2, 2), (4, 4)], 64)


@pytest.fixture(scope="module")
def shards(pairs, tmp_path_factory) -> Path:
    """Three shards of four pictures with captions and classes."""
    folder = tmp_path_factory.mktemp("shards")
    pictures = sorted(pairs.glob("*.png"))
    for shard in range(3):
        members = {}
        for i, path in enumerate(pictures[4 * shard : 4 * shard + 4]):
            members[f"{path.stem}.png"] = path.read_bytes()
            members[f"{path.stem}.txt"] = path.stem.replace("_", " ").encode()
            members[f"{path.stem}.cls"] = str(i % 2).encode()
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def server(shards):
    with serve(shards) as running:
        yield running


@pytest.fixture
def bucket(shards):
    """The shards at a URL of fsspec's file system in memory."""
    name, system = f"memory://{uuid.uuid4().hex}", fsspec.filesystem("memory")
    for path in shards.iterdir():
        system.pipe_file(f"{name}/{path.name}", path.read_bytes())
    yield name
    system.rm(name, recursive=True)


@pytest.fixture(params=["web", "bucket", "pattern", "one copy"])
def source(request, shards, server, bucket) -> str:
    """Where else the shards are."""
    return {
        "web": f"{server.url}/part-{{0..2}}.tar",
        "bucket": bucket,
        "pattern": f"{shards}/part-{{0,1,2}}.tar",
        "one copy": f"simplecache::{server.url}/part-{{0..2}}.tar",
    }[request.param]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_of_the_folder(shards, source, workers):
    """Captions, classes and crops: sample g, read by workers too."""
    partition = crops.BatchPartition(4)
    sets = {
        "captions": lambda path: captions.Captioned(path, FORM, CaptionConfig(), 4, 7),
        "labels": lambda path: labels.Labelled(path, FORM, LabelConfig(), 4, 7, count=2),
        "crops": lambda path: crops.RandomCrops(
            images.open_images(DataConfig(path=path), 4, 7)[0], 32, DataConfig(), 7
        ),
    }
    for kind, build in sets.items():
        collate = {"captions": captions.collate, "labels": labels.collate}.get(kind)
        one, other = (
            crops.loader(build(path), partition, 8, workers, collate)
            for path in (str(shards), source)
        )
        for _ in range(4):
            a, b = next(one), next(other)
            if kind == "crops":
                assert torch.equal(a, b)
            else:
                assert torch.equal(a[0], b[0])
                assert list(a[1]) == list(b[1])


def test_held_out_pictures_are_those_of_the_folder(shards, source):
    one, other = (images.open_images(DataConfig(path=p), 4, 7)[1] for p in (str(shards), source))
    assert torch.equal(crops.held_out_crops(one, 32, 8), crops.held_out_crops(other, 32, 8))


def test_a_run_over_the_web_resumes(micro, shards, server, tmp_path):
    """Six steps are three and three, and the steps on the folder itself."""
    url = f"{server.url}/part-{{0..2}}.tar"
    runs = {"local": str(shards), "whole": url, "halves": url}
    for name, path in runs.items():
        settings = micro.overrides(tmp_path / name, path, *micro.PIXEL_ONLY)
        tokenizer.main(settings)
    shutil.rmtree(checkpoint.available(tmp_path / "halves/checkpoints")[-1])
    tokenizer.main([f"run={tmp_path / 'halves'}", "--resume"])
    micro.assert_same_end(tmp_path / "whole", tmp_path / "halves")
    one, other = (
        checkpoint.available(tmp_path / name / "checkpoints")[-1] / "model.safetensors"
        for name in ("local", "whole")
    )
    assert one.read_bytes() == other.read_bytes()


def test_pictures_in_a_bucket(pairs, micro):
    """A folder of pictures with a listing, by URL."""
    name, system = f"memory://{uuid.uuid4().hex}", fsspec.filesystem("memory")
    for path in pairs.iterdir():
        system.pipe_file(f"{name}/{path.name}", path.read_bytes())
    one, other = (
        captions.Captioned(path, FORM, CaptionConfig(), 4, 7) for path in (str(pairs), name)
    )
    assert len(one.source) == len(other.source) == 12
    for g in range(14):
        assert one[g].caption == other[g].caption
        assert torch.equal(one[g].picture, other[g].picture)
    found, held_out = images.open_images(DataConfig(path=name), 4, 7)
    wanted, also = images.open_images(DataConfig(path=str(pairs)), 4, 7)
    assert found.describe() == wanted.describe()
    assert torch.equal(crops.held_out_crops(held_out, 32, 8), crops.held_out_crops(also, 32, 8))
    system.rm(name, recursive=True)


def test_a_server_without_ranges_is_named(shards):
    with serve(shards, ranges=False) as server:
        paths = webdataset.find_shards(f"{server.url}/part-{{0..2}}.tar")
        with pytest.raises(DataError, match=r"part-\d.tar"):
            webdataset.Shards(paths, (1, 1), 4, 0).at(0)
        copies = webdataset.find_shards(f"simplecache::{server.url}/part-{{0..2}}.tar")
        assert webdataset.Shards(copies, (1, 1), 4, 0).at(0).size == (32, 32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/{0..2}.tar", ["a/0.tar", "a/1.tar", "a/2.tar"]),
        ("{08..10}", ["08", "09", "10"]),
        ("s3://b/{x,y}/{1..2}.tar", [f"s3://b/{a}/{i}.tar" for a in "xy" for i in (1, 2)]),
        ("plain.tar", ["plain.tar"]),
        ("{one}", ["{one}"]),
        ("a{b", ["a{b"]),
    ],
)
def test_patterns(text, expected):
    assert places.expand(text) == expected


def test_a_folder_called_as_a_pattern_is_a_folder(tmp_path):
    (tmp_path / "{a,b}").mkdir()
    assert places.expand(f"{tmp_path}/{{a,b}}") == [f"{tmp_path}/{{a,b}}"]


@pytest.mark.parametrize("text", ["{1..1000001}", "{1..2000}{1..2000}", "{a,b}" * 21])
def test_patterns_for_too_much(text):
    with pytest.raises(DataError, match="more than 1000000 names"):
        places.expand(text)


def test_drivers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingPackageError, match="s3fs"):
        places.place("s3://bucket/x.tar")


@pytest.mark.parametrize("text", ["http://127.0.0.1:9/x.tar", "memory://nowhere/x.tar"])
def test_what_is_not_there_is_named(text):
    with pytest.raises(DataError, match=r"x\.tar"):
        webdataset.read_members(webdataset.find_shards(text)[0])


def test_file_urls_are_paths(tmp_path):
    assert places.place(f"file://{tmp_path}/a") == tmp_path / "a"
    assert not places.is_remote(places.place("C:/x"))
