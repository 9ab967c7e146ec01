"""Losses of the tokenizer, and the discriminators that some of them need."""

from .discriminators import build_discriminator
from .tokenizer import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    LPIPS,
    LossParts,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    hinge_d_loss,
    hinge_g_loss,
    logistic_d_loss,
    non_saturating_g_loss,
    reconstruction_loss,
    semantic_loss,
    tokenizer_loss,
)

__all__ = [
    "DISCRIMINATOR_LOSSES",
    "GENERATOR_LOSSES",
    "LPIPS",
    "LossParts",
    "adaptive_weight",
    "build_discriminator",
    "discriminator_loss",
    "generator_loss",
    "hinge_d_loss",
    "hinge_g_loss",
    "logistic_d_loss",
    "non_saturating_g_loss",
    "reconstruction_loss",
    "semantic_loss",
    "tokenizer_loss",
]
