"""The Frechet distance of two sets of pictures, as FID where Inception's weights are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenflow_ext.models import WeightsError
from tokenflow_ext.models.metrics import FeatureSums, frechet
from tokenflow_ext.train.data.image_files import check_depth, open_image
from tokenflow_ext.train.data.text_files import DataError, check_file, reason
from tokenflow_ext.train.engine.distributed import find_device

from . import fid as network
from . import networks
from .metrics import METRICS, Features

_SUFFIXES = (".png", ".jpg", ".jpeg")


class Pictures(Dataset[Tensor]):
    """uint8 [3, H, W] of pictures of one size, from the files right inside a folder or from the
    array ``arr_0`` [N, H, W, 3] of an npz file.

    Raises:
        DataError: fewer than two, one that cannot be read or has more than 8 bits, different sizes.
    """

    def __init__(self, source: Path | np.ndarray, name: str) -> None:
        self.source = source
        self.paths: list[Path] = []
        if isinstance(source, Path):
            self.paths = [p for p in sorted(source.iterdir()) if p.suffix.lower() in _SUFFIXES]
        count = len(self)
        if count < 2:
            raise DataError(f"FID needs two pictures or more, {name} holds {count}")
        sizes = set()
        for path in self.paths:  # the library would end with a traceback
            sizes.add(open_image(path).size)
            check_depth(path)
        if len(sizes) > 1:
            raise DataError(f"the pictures in {name} have different sizes: {sorted(sizes)[:4]}")

    def __len__(self) -> int:
        return len(self.paths) if isinstance(self.source, Path) else len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        if isinstance(self.source, Path):
            pixels = np.array(open_image(self.paths[index]))
        else:
            pixels = self.source[index]
        return torch.from_numpy(pixels).permute(2, 0, 1)


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    covariance: Tensor


def read(path: str | Path) -> Pictures | Statistics:
    """The pictures of a folder or an npz file, or the statistics in one.

    Raises:
        DataError: nothing there, or something else.
    """
    place = Path(path)
    if place.is_dir():
        return Pictures(place, str(place))
    if place.suffix != ".npz":
        raise DataError(f"no folder at {place}" if not place.exists() else f"{place} is no .npz")
    try:
        check_file(place)
        with np.load(place, allow_pickle=False) as file:
            wanted = ("mu", "sigma") if {"mu", "sigma"} <= set(file.files) else ("arr_0",)
            if missing := [name for name in wanted if name not in file.files]:
                raise DataError(f"{place} has no {missing[0]}, but {', '.join(file.files[:8])}")
            arrays = [file[name] for name in wanted]
    except DataError:
        raise
    except Exception as error:  # whatever bytes that anybody can write lead to
        raise DataError(f"cannot read {place}: {reason(error)}") from error
    if len(arrays) == 1:
        found = arrays[0]
        if found.ndim != 4 or found.shape[3] != 3 or found.dtype != np.uint8:
            raise DataError(f"{place}: arr_0 must be uint8 [N, H, W, 3], got {_kind(found)}")
        return Pictures(found, str(place))
    mean, covariance = arrays
    right = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
    if not (right and all(np.issubdtype(x.dtype, np.floating) for x in arrays)):
        raise DataError(f"{place}: mu and sigma are {_kind(mean)} and {_kind(covariance)}")
    if not all(np.isfinite(x).all() for x in arrays):
        raise DataError(f"{place}: mu and sigma are not finite")
    return Statistics(*(torch.from_numpy(x.astype(np.float64)) for x in arrays))


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _moments(
    given: Pictures | Statistics, features: Features, device: torch.device, batch: int
) -> tuple[Tensor, Tensor]:
    if isinstance(given, Statistics):
        if len(given.mean) != features.width:
            raise DataError(
                f"the statistics are of {len(given.mean)} features, FID has {features.width}"
            )
        return given.mean, given.covariance
    sums = FeatureSums(features.width, device)
    for pixels in DataLoader(given, batch_size=batch):
        sums.add(features.extract(pixels.to(device)))
    mean, covariance = sums.gaussian()
    return mean.cpu(), covariance.cpu()


def compare(
    one: str | Path,
    other: str | Path,
    weights: str | Path | None = None,
    device: str = "auto",
    batch: int = 64,
    *,
    more: bool = False,
) -> tuple[dict[str, float], str]:
    """The Frechet distance of two sets of pictures, and what its features are.

    Each is a folder of pictures, an npz file of them (``arr_0``, uint8 [N, H, W, 3]) or one of
    statistics (``mu`` and ``sigma`` of Inception's pool features), as OpenAI's evaluation reads
    and provides them.

    Args:
        weights: Inception's; None looks into torch's cache, and takes the stand-in
            (:data:`.metrics.METRICS`) where they are not there.
        more: the Inception score of ``one`` and precision and recall too.

    Returns:
        Figures by name: ``fid`` or ``fd_efflite0``, ``inception_score``,
        ``inception_score_deviation``, ``precision``, ``recall``; and lines about them.

    Raises:
        ConfigError: no such device.
        DataError: see :func:`read`, or statistics of other features.
        WeightsError: no weights to measure with, or ``more`` without Inception's.
    """
    place, sets = find_device(device), (read(one), read(other))
    whole = all(isinstance(given, Pictures) for given in sets)
    if more and not whole:
        raise DataError("the Inception score, precision and recall need pictures, not statistics")
    why, path = "", None
    try:
        path = network.ready(weights)
    except WeightsError as error:
        if more or not whole or weights is not None:
            raise
        why = str(error)
    if path is not None and whole:
        return _by_library(*sets, path, place, batch, more), METRICS["rfid"][2]
    if why:
        try:
            features = networks.lite0_features(place)
        except WeightsError as error:
            raise WeightsError(f"{why}; nor is the stand-in there: {error}") from error
    else:
        features = networks.inception_features(weights, place)
    first, second = (_moments(given, features, place, batch) for given in sets)
    definition = METRICS[features.metric][2]
    if why:
        return {features.metric: frechet(first, second)}, f"{definition}. No FID: {why}"
    return {"fid": frechet(first, second)}, definition


def fid(
    one: str | Path,
    other: str | Path,
    weights: str | Path | None = None,
    device: str = "auto",
    batch: int = 64,
) -> float:
    """The FID alone; arguments and errors as of :func:`compare`.

    Raises:
        WeightsError: Inception's weights are missing: no stand-in takes their place.
    """
    network.ready(weights)
    return compare(one, other, weights, device, batch)[0]["fid"]


def _by_library(
    one: Any,
    other: Any,
    weights: Path,
    device: torch.device,
    batch: int,
    more: bool,
) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=one,
        input2=other,
        fid=True,
        isc=more,
        prc=more,
        feature_extractor="inception-v3-compat",  # of precision and recall too, as OpenAI's have it
        feature_extractor_weights_path=str(weights),
        cuda=device.type == "cuda",
        batch_size=batch,
        verbose=False,
        save_cpu_ram=True,  # reads in this process
        cache=False,
    )
    names = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_score_deviation": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    return {name: float(found[key]) for name, key in names.items() if key in found}
