"""What a tokenizer is trained on and evaluated on: a folder of images, or one of shards."""

from __future__ import annotations

from tokenflow_ext.train.config import DataConfig

from . import crops
from .crops import Picture, PictureSet, Source
from .image_files import list_images
from .text_files import DataError
from .webdataset import Shards, beside, find_shards, first_pictures


def open_images(config: DataConfig, joint: int, seed: int) -> tuple[Source, list[Picture]]:
    """What crops are cut from for training, and the pictures that are held out.

    Of a folder of images see :func:`data.split`; of shards the first one is held out where
    ``config.held_out`` names nothing.

    Args:
        joint: samples that all processes take together for one micro-batch.

    Raises:
        DataError: nothing that can be read, or settings that are for data of another kind.
    """
    paths = [] if config.path is None else find_shards(config.path)
    if paths:
        if config.weights is not None:
            raise DataError(
                f"data.weights is for folders of images; {config.path} holds shards: name the key "
                "of the weight in KEY.json with data.weight_key"
            )
        held_out = _held_out(config)
        if config.held_out is None:
            if len(paths) < 2:
                raise DataError(
                    f"{config.path} holds one shard, and one is held out: name others with "
                    "data.held_out=FOLDER"
                )
            held_out, paths = first_pictures(paths[:1], config.held_out_crops), paths[1:]
        across, along = config.streams
        shards = Shards(paths, (across, along), joint, seed, weight_key=config.weight_key)
        if config.path is not None:
            shards.beside = beside(config.path)
        return shards, held_out
    if config.weight_key:
        raise DataError(
            f"data.weight_key is for shards, and data.path={config.path} holds none: name a file "
            "of weights with data.weights"
        )
    train, held_out = crops.split(config)
    weights = None
    if config.weights is not None:
        if config.path is None:
            raise DataError("data.weights is for a folder of images: name it with data.path")
        weights = crops.read_weights(config.weights, config.path)
        known = {p.path for p in (*train, *held_out)}
        if strangers := sorted(set(weights) - known):
            raise DataError(
                f"{config.weights} names {len(strangers)} images that data.path={config.path} does "
                f"not have, first {strangers[0]}"
            )
    source = PictureSet(train, seed, weights, config.cache)
    return source, _held_out(config) or held_out


def _held_out(config: DataConfig) -> list[Picture]:
    """The pictures that ``config.held_out`` names, if it names any."""
    if config.held_out is None:
        return []
    paths = find_shards(config.held_out)
    if paths:
        beside(config.held_out)
        return first_pictures(paths, config.held_out_crops)
    return [Picture(path) for path in list_images(config.held_out)]
