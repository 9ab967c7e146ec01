"""Images, captions and tokens to train on, and the files that commands read and write."""

from tokenflow_ext._deprecated import renamed

from .crops import (
    HELD_OUT_BAND,
    PHOTOGRAPHS,
    BatchPartition,
    Kept,
    Picture,
    PictureSet,
    RandomCrops,
    Source,
    checked_weight,
    counted_rng,
    draw_round,
    held_out_crops,
    listing,
    loader,
    photograph_licences,
    photographs,
    read_batches,
    read_span,
    read_weights,
    split,
)
from .image_files import BrokenImageError, list_images, open_image, to_tensor
from .text_files import DataError

__all__ = [
    "HELD_OUT_BAND",
    "PHOTOGRAPHS",
    "BatchPartition",
    "BrokenImageError",
    "DataError",
    "Kept",
    "Picture",
    "PictureSet",
    "RandomCrops",
    "Source",
    "checked_weight",
    "counted_rng",
    "draw_round",
    "held_out_crops",
    "list_images",
    "listing",
    "loader",
    "open_image",
    "photograph_licences",
    "photographs",
    "read_batches",
    "read_span",
    "read_weights",
    "split",
    "to_tensor",
]

__getattr__ = renamed(
    __name__,
    {
        "Shard": "BatchPartition",
        "check_counts": "tokenflow_ext.train.cli.options:check_counts",
    },
)
