"""The network that FID is defined by, from its own weights, or why there is none."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import WeightsError
from tokenflow_ext.models.serialization.pretrained import read_torch

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_DIGEST = WEIGHTS.removesuffix(".pth").rpartition("-")[2]  # how the SHA-256 begins


def _cached() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def find_weights(given: str | Path | None = None) -> Path:
    """Inception's weights: the file given, or the one in torch's cache.

    Raises:
        WeightsError: no such file, another one, or one with more than weights in it.
    """
    cached = _cached()
    path = cached if given is None else Path(given)
    if not path.is_file():
        raise WeightsError(
            f"FID needs the Inception weights that it is defined by: no file {path}. It is "
            f"{WEIGHTS} of torch-fidelity's release v0.2.0; put it at {cached}, or name it with "
            "--weights FILE"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(_DIGEST):
        raise WeightsError(
            f"{path} is not {WEIGHTS}: its SHA-256 begins with {digest[:8]}, not {_DIGEST}"
        )
    read_torch(path, WeightsError)  # torch-fidelity would read any pickle
    return path


def ready(weights: str | Path | None) -> Path:
    """The checked weights' path, where torch-fidelity is installed.

    Raises:
        WeightsError: it is not, or the weights are missing.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise WeightsError(
            "FID needs torch-fidelity: pip install 'tokenflow_ext[eval]'; and its Inception "
            f"weights, {WEIGHTS}, at {_cached()} or as --weights FILE"
        )
    return find_weights(weights)


def inception(weights: str | Path | None = None) -> torch.nn.Module:
    """The network of FID: uint8 [B, 3, H, W] -> a tuple of its pool features [B, 2048] alone.

    Raises:
        WeightsError: torch-fidelity or the weights are missing.
    """
    path = ready(weights)
    from torch_fidelity import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )


__getattr__ = renamed(__name__, {"fid": "tokenflow_ext.train.evaluation.picture_sets:fid"})
