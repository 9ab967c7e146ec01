"""Crops: the same everywhere, dealt out without gap or overlap, held-out pixels never seen."""

from __future__ import annotations

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflow_ext.train import data
from tokenflow_ext.train.config import DataConfig
from tokenflow_ext.train.data import crops
from tokenflow_ext.train.data.image_files import open_image, to_pixels, to_tensor
from tokenflow_ext.train.data.images import open_images


def dataset(images, seed=0, **config) -> data.RandomCrops:
    train, _ = data.split(DataConfig(path=str(images)))
    source = data.PictureSet(train, seed)
    return data.RandomCrops(source, 16, DataConfig(path=str(images), **config), seed)


def test_a_sample_depends_on_seed_and_index_alone(images):
    one, other = dataset(images), dataset(images)
    backwards = {i: other[i] for i in reversed(range(12))}
    for i in range(12):
        assert torch.equal(one[i], backwards[i])
    assert not torch.equal(one[3], dataset(images, seed=1)[3])
    assert len({one[i].numpy().tobytes() for i in range(12)}) == 12


def test_every_picture_is_visited_once_an_epoch(images):
    source = dataset(images).source
    n = len(source.pictures)
    for epoch in range(4):
        assert sorted(source.which(epoch * n + i) for i in range(n)) == list(range(n))


def test_samples_are_in_range_and_shape(images):
    for i in range(20):
        sample = dataset(images)[i]
        assert sample.shape == (3, 16, 16)
        assert sample.dtype == torch.float32
        assert sample.min() >= -1
        assert sample.max() <= 1


@settings(deadline=None, max_examples=60)
@given(
    world=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    local=st.integers(1, 4),
    position=st.integers(0, 10**12),
)
def test_processes_share_out_the_joined_batch(world, accumulate, local, position):
    batch = world * accumulate * local
    partitions = [data.BatchPartition(batch, accumulate, rank, world) for rank in range(world)]
    parts = [each.indices(position, micro) for micro in range(accumulate) for each in partitions]
    assert list(itertools.chain(*parts)) == list(range(position, position + batch))


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(data.DataError, match=r"10.*4 processes"):
        data.BatchPartition(10, 1, 0, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_at_any_position(images, workers):
    crops, partition = dataset(images), data.BatchPartition(4, accumulate=2)
    state = torch.get_rng_state()
    batches = iter(data.loader(crops, partition, 8, workers))
    for start in (8, 10, 12):
        assert torch.equal(next(batches), torch.stack([crops[start], crops[start + 1]]))
    assert torch.equal(state, torch.get_rng_state())  # reading leaves the generator alone


def test_no_held_out_pixel_is_trained_on(tmp_path):
    """The held-out band is painted red: no training crop may show it, every held-out crop does."""
    for name, shape in (("wide", (60, 100, 3)), ("tall", (100, 60, 3))):
        pixels = np.zeros(shape, np.uint8)
        start, stop = (round(share * 100) for share in data.HELD_OUT_BAND)
        band = (slice(None), slice(start, stop)) if name == "wide" else (slice(start, stop),)
        pixels[(*band, ..., 0) if name == "tall" else (*band, 0)] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    train, held_out = data.split(DataConfig(path=str(tmp_path)))
    crops = data.RandomCrops(data.PictureSet(train, 0), 16, DataConfig(min_crop=0.1), 0)
    assert all((crops[i] == -1).all() for i in range(60))
    shown = data.held_out_crops(held_out, 16, 50)
    assert (shown[:, 0] == 1).all()


def test_a_large_folder_holds_out_whole_images(tmp_path):
    for i in range(41):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    train, held_out = data.split(DataConfig(path=str(tmp_path)))
    assert len(train) + len(held_out) == 41
    assert not {p.path for p in train} & {p.path for p in held_out}
    config = DataConfig(path=str(tmp_path), held_out=str(tmp_path))
    source, own = open_images(config, 4, 0)
    assert (len(source.pictures), len(own)) == (41, 41)


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_held_out_crops_keep_to_the_limit(images, limit):
    _, held_out = data.split(DataConfig(path=str(images)))
    crops = data.held_out_crops(held_out, 16, limit)
    assert 1 <= len(crops) <= limit
    assert torch.equal(crops, data.held_out_crops(held_out, 16, limit))


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(data.DataError, match=r"broken\.png"):
        data.PictureSet([data.Picture(tmp_path / "broken.png")], 0)
    (tmp_path / "broken.png").unlink()
    with pytest.raises(data.DataError, match="no image"):
        data.list_images(tmp_path)
    with pytest.raises(data.DataError, match="nowhere"):
        data.list_images(tmp_path / "nowhere")


def test_tiny_pictures_are_trained_on_or_counted(tmp_path, capsys):
    sides = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 500), (40, 30)]
    for i, size in enumerate(sides):
        Image.new("RGB", size, (i, i, i)).save(tmp_path / f"{i}.png")
    config = DataConfig(path=str(tmp_path))
    source, held_out = open_images(config, 4, 0)
    crops = data.RandomCrops(source, 8, config, 0)
    seen = {round((crops[g].mean().item() + 1) * 127.5) for g in range(len(sides))}
    assert seen == set(range(len(sides)))
    shown = data.held_out_crops(held_out, 8, 1000)
    levels = {round((crop.mean().item() + 1) * 127.5) for crop in shown}
    assert {1, 2, 4, 5} <= levels
    assert "1 images too small to hold a band of them out" in capsys.readouterr().err
    for i in range(1, len(sides)):
        (tmp_path / f"{i}.png").unlink()
    _, held_out = open_images(config, 4, 0)
    with pytest.raises(data.DataError, match=r"no held-out image.*too small.*0\.png"):
        data.held_out_crops(held_out, 8, 10)


def test_held_out_crops_of_large_pictures_are_not_held_at_once(tmp_path, monkeypatch):
    for i in range(6):
        Image.new("RGB", (64, 48 + i), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    every = [data.Picture(path) for path in data.list_images(tmp_path)]
    expected = data.held_out_crops(every, 8, 20)
    monkeypatch.setattr(crops, "_memory", lambda regions: 100 << 20)  # two fit
    kept, add = [], data.Kept.add
    monkeypatch.setattr(data.Kept, "add", lambda *a: kept.append(add(*a)) or kept[-1])
    assert torch.equal(data.held_out_crops(every, 8, 20), expected)
    assert kept == [True, True, False, False, False, False]


def test_decoded_pictures_are_bounded_in_bytes(tmp_path):
    for i in range(5):
        Image.new("RGB", (256, 256), (i, i, i)).save(tmp_path / f"{i}.png")  # a quarter of a MiB
    every = [data.Picture(path) for path in data.list_images(tmp_path)]
    for mib, kept in ((0, 0), (1, 4), (2, 5)):
        source = data.PictureSet(every, 0, cache=mib)
        held = [source.regions(g)[0] for g in range(5)]
        again = [source.regions(g)[0] for g in range(5)]
        assert sum(a is b for a, b in zip(held, again, strict=True)) == kept
        assert sorted(image.getpixel((0, 0))[0] for image in again) == list(range(5))
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"0\.png"):
        data.PictureSet(every, 0, cache=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_error_is_one_line(tmp_path, workers):
    for i in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    crops = dataset(tmp_path, cache=0)
    crops.source._kept = data.Kept(0)
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(data.DataError) as error:
        list(itertools.islice(data.loader(crops, data.BatchPartition(4), 0, workers), 1))
    assert str(error.value) == f"cannot read the image {tmp_path}/2.png: of no known format"


class _Killing(torch.utils.data.Dataset):
    """Its samples end the process that asks for one, as the system does where memory runs out."""

    seed = 0

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_ends_is_told_in_one_line():
    with pytest.raises(data.DataError, match=r"^a process that decodes images has ended \(.*\): "):
        next(data.loader(_Killing(), data.BatchPartition(2), 0, 1))


def test_a_span_is_compared_with_its_file(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    assert data.read_span(tmp_path / "a", (2, 3)) == b"234"
    for span in ((0, 2**40), (2**62, 1), (5, 6), (-1, 2), (3, -1)):
        with pytest.raises(data.DataError, match=r"cannot read .*/a: it ends before"):
            data.read_span(tmp_path / "a", span)


def test_pixels_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    image = Image.fromarray(levels[..., None].expand(-1, -1, 3).contiguous().numpy())
    assert np.array_equal(to_pixels(to_tensor(image)[None])[0], np.array(image))


def test_built_in_photographs_open_and_have_licences():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    paths = data.photographs()
    assert len(paths) == len(data.PHOTOGRAPHS)
    assert all(min(open_image(path).size) >= 256 for path in paths)
    lines = data.photograph_licences().splitlines()
    assert all("CC" in line or "public domain" in line for line in lines)
