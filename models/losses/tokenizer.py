"""Losses of tokenizer training (arXiv 2412.03069, section 3.1).

total = L_sem + L_VQ + L_pix, with L_pix = l2 + LPIPS + lambda_G * L_G.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from tokenflow_ext.errors import WeightsError
from tokenflow_ext.models.towers.teachers import read_state

if TYPE_CHECKING:
    from tokenflow_ext.models.tokenizer.model import TokenizerOutput


def semantic_loss(pred: Tensor, target: Tensor, kind: str = "cosine") -> Tensor:
    """Distance of decoded semantic tokens from the teacher's, both [B, N, C] (0-dim, float32).

    Args:
        kind: ``cosine``, the mean over tokens of 1 - cos (what the original weights were trained
            with), or ``l2``, the mean squared difference (what the paper prints).

    Raises:
        ValueError: shapes that differ, or another kind.
    """
    if pred.shape != target.shape:
        raise ValueError(
            "pred and target must have one shape [B, N, C], got "
            f"{tuple(pred.shape)} and {tuple(target.shape)}"
        )
    pred, target = pred.float(), target.detach().float()
    if kind == "cosine":
        return (1.0 - F.cosine_similarity(pred, target, dim=-1)).mean()
    if kind == "l2":
        return F.mse_loss(pred, target)
    raise ValueError(f"kind must be 'cosine' or 'l2', got {kind!r}")


def reconstruction_loss(pred: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference of images [B, 3, H, W] (0-dim, float32)."""
    return F.mse_loss(pred.float(), images.float())


def hinge_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss of its logits on real and on decoded images (0-dim)."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def logistic_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's cross-entropy of "real" and "decoded" (arXiv 1406.2661, eq. 1; 0-dim)."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def hinge_g_loss(fake: Tensor) -> Tensor:
    """The generator's loss under the hinge: minus the mean logit of decoded images (0-dim)."""
    return -fake.float().mean()


def non_saturating_g_loss(fake: Tensor) -> Tensor:
    """Minus the mean log-probability that decoded images are real (arXiv 1406.2661, section 3)."""
    return F.softplus(-fake.float()).mean()


# "vanilla" and "non-saturating" name games that differ in the generator's loss alone: their
# discriminator minimises the same cross-entropy. LlamaGen's code for the second hands logits and
# labels over in each other's place, which makes it linear in the logits; that is not repeated here.
DISCRIMINATOR_LOSSES = {
    "hinge": hinge_d_loss,
    "vanilla": logistic_d_loss,
    "non-saturating": logistic_d_loss,
}
GENERATOR_LOSSES = {"hinge": hinge_g_loss, "non-saturating": non_saturating_g_loss}


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """Loss of the discriminator's logits on real and on decoded images (0-dim, float32).

    Raises:
        ValueError: another kind than those of ``DISCRIMINATOR_LOSSES``.
    """
    return _named(DISCRIMINATOR_LOSSES, kind)(real, fake)


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """Loss L_G of the discriminator's logits on decoded images (0-dim, float32).

    Raises:
        ValueError: another kind than those of ``GENERATOR_LOSSES``.
    """
    return _named(GENERATOR_LOSSES, kind)(fake)


def _named(losses: dict[str, Callable[..., Tensor]], kind: str) -> Callable[..., Tensor]:
    if kind not in losses:
        raise ValueError(f"kind must be one of {', '.join(losses)}, got {kind!r}")
    return losses[kind]


def adaptive_weight(
    reconstruction: Tensor, generator: Tensor, last_layer: Tensor, maximum: float = 1e4
) -> Tensor:
    """Ratio of two losses' gradient norms at the decoder's last weight (arXiv 2012.09841, eq. 7).

    Args:
        reconstruction, generator: 0-dim losses whose graph is kept.
        last_layer: the weight (``TokenFlowTokenizer.last_layer``).
        maximum: upper bound.

    Returns:
        A 0-dim tensor without gradient, to multiply lambda_G with.
    """
    (a,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (b,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0.0, maximum).detach()


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924) with VGG16, frozen.

    The linear heads come with the package ``lpips``; VGG16 is the user's copy of torchvision's
    ``vgg16-397923af.pth``. Nothing is downloaded.

    Args:
        vgg16: path of that file.

    Raises:
        WeightsError: no path, no such file, or a file that is not torchvision's VGG16.
        ImportError: lpips is not installed.
    """

    def __init__(self, vgg16: str | Path | None) -> None:
        super().__init__()
        wanted = "torchvision's VGG16 weights (vgg16-397923af.pth, or a state dict with its names)"
        if vgg16 is None:
            raise WeightsError(f"LPIPS needs {wanted}: give the file's path")
        if not Path(vgg16).is_file():
            raise WeightsError(f"LPIPS: no file at {vgg16}: put there {wanted}")
        state = read_state(vgg16)
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                f"the LPIPS loss needs lpips: pip install 'tokenflow_ext[models]' ({error})"
            ) from error
        with warnings.catch_warnings():  # lpips builds VGG16 by an old spelling of torchvision's
            warnings.simplefilter("ignore", UserWarning)
            model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        own = model.state_dict()
        # "net.slice2.5.weight" is torchvision's "features.5.weight".
        names = {
            name: re.sub(r"net\.slice\d+\.", "features.", name)
            for name in own
            if name.startswith("net.slice")
        }
        if len(names) != 2 * 13:
            raise ImportError(
                f"the LPIPS loss knows VGG16 as 13 convolutions in lpips' state dict, and finds "
                f"{len(names)} weights of it instead of 26: pip install lpips==0.1.4"
            )
        for name, key in names.items():
            if key not in state or state[key].shape != own[name].shape:
                raise WeightsError(
                    f"{vgg16} is not {wanted}: {key} of shape {tuple(own[name].shape)} is not in it"
                )
        model.load_state_dict({**own, **{name: state[key] for name, key in names.items()}})
        self.model = model
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode (the heads have dropout) whatever ``mode`` is."""
        return super().train(False)

    def forward(self, pred: Tensor, images: Tensor) -> Tensor:
        """Mean distance of images [B, 3, H, W] in [-1, 1] (0-dim)."""
        return self.model(pred.float(), images.float()).mean()


class LossParts(NamedTuple):
    """The generator's side of training: the sum, and what it is made of (all 0-dim)."""

    total: Tensor
    semantic: Tensor
    vq: Tensor
    l2: Tensor
    lpips: Tensor
    generator: Tensor


@record_function("losses")
def tokenizer_loss(
    output: TokenizerOutput,
    images: Tensor,
    teacher: Tensor | None = None,
    *,
    perceptual: nn.Module | None = None,
    fake_logits: Tensor | None = None,
    semantic_kind: str = "cosine",
    semantic_weight: float = 1.0,
    vq_weight: float = 1.0,
    l2_weight: float = 1.0,
    perceptual_weight: float = 1.0,
    generator_weight: float = 0.5,
    generator_kind: str = "hinge",
    adaptive_layer: Tensor | None = None,
) -> LossParts:
    """total = L_sem + L_VQ + L_pix of one step; a part with no input or weight 0 is zero.

    Args:
        output: a :class:`~tokenflow_ext.models.TokenizerOutput`; without images (a tokenizer of the
            semantic branch alone) L_pix is left out.
        images: the originals [B, 3, H, W].
        teacher: the teacher's features [B, N, C]; None leaves L_sem out.
        perceptual: for example :class:`LPIPS`; None leaves it out.
        fake_logits: the discriminator's logits of ``output.images``; None leaves L_G out.
        generator_weight: lambda_G.
        generator_kind: ``hinge`` or ``non-saturating``.
        adaptive_layer: the decoder's last weight, to scale lambda_G by :func:`adaptive_weight`.

    Returns:
        The parts before their weights, and their weighted sum.
    """
    zero = output.quantizer.vq_loss.new_zeros((), dtype=torch.float32)
    sem = vis = gen = zero
    if teacher is not None and output.semantic is not None and semantic_weight:
        sem = semantic_loss(output.semantic, teacher, semantic_kind)
    vq = output.quantizer.vq_loss + output.quantizer.commitment_loss if vq_weight else zero
    decoded = output.images
    l2 = reconstruction_loss(decoded, images) if decoded is not None and l2_weight else zero
    if decoded is not None and perceptual is not None and perceptual_weight:
        vis = perceptual(decoded, images)
    pixel = l2_weight * l2 + perceptual_weight * vis
    total = semantic_weight * sem + vq_weight * vq + pixel
    if fake_logits is not None and generator_weight:
        gen = generator_loss(fake_logits, generator_kind)
        scale = 1.0 if adaptive_layer is None else adaptive_weight(pixel, gen, adaptive_layer)
        total = total + generator_weight * scale * gen
    return LossParts(total, sem, vq, l2, vis, gen)
