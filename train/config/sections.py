"""Sections that runs of several kinds have: data, optimizer, losses of images, output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DataConfig:
    """What is trained on.

    ``path`` is a folder of images (searched in all its folders), or of WebDataset shards
    (``*.tar``); without it the photographs that ship inside scikit-image and scikit-learn are used.
    ``held_out`` is a second such folder for the evaluation; without it, part of the data is set
    aside and never trained on: some of the images, or the first shard.
    """

    path: str | None = None
    held_out: str | None = None
    held_out_crops: int = 96
    min_crop: float = 0.25  # side of the smallest random crop, as a share of the shorter side
    max_crop: float = 0.6
    aspect: float = 1.15  # width / height of a random crop lies within [1 / aspect, aspect]
    flip: bool = True
    # How much oftener than once a round an image comes: a file of {"file_name": ..., "weight": ...}
    # a line for a folder, a key of KEY.json for shards.
    weights: str | None = None
    weight_key: str = ""
    streams: tuple[int, ...] = (1, 1)  # see CaptionConfig
    workers: int = 0  # processes that decode images; none: in the training process itself
    cache: int = 256  # MiB of decoded images that a process keeps, the first that fit


@dataclass
class OptimConfig:
    """AdamW and its schedule. ``batch`` is the number of images of one optimizer step over all
    processes and accumulation steps together, so a run means the same on any machine."""

    steps: int = 1300
    batch: int = 16
    accumulate: int = 1
    lr: float = 2.0e-3
    discriminator_lr: float = 2.0e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: str = "cosine"  # or "linear", "constant"
    warmup: int = 50
    warmup_lr: float = 0.0  # of lr, where the warm-up starts
    flat: float = 0.05  # "linear": share of the steps after the warm-up that keep lr
    final_lr: float = 0.02  # of lr, where the schedule ends
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    precision: str = "fp32"  # or "bf16", "fp16"


@dataclass
class PixelLossConfig:
    """Losses of the decoded images and their weights; 0 switches one off (arXiv 2412.03069,
    section 3.2).

    L_pix = pixel * L2 + perceptual * LPIPS + gan * L_G, the last from step ``gan_start`` on.
    """

    pixel: float = 1.0
    perceptual: float = 0.0
    perceptual_weights: str | None = None  # torchvision's VGG16 file
    gan: float = 0.0
    gan_start: int = 20000
    # Times the ratio of the other losses' gradient to L_G's at the last layer (VQGAN); the released
    # training has it off.
    gan_adaptive: bool = False
    discriminator: str = "patchgan"  # or "stylegan"
    discriminator_channels: int = 64  # of its first layer
    discriminator_loss: str = "hinge"  # or "vanilla", "non-saturating" (the same cross-entropy)
    generator_loss: str = "hinge"  # or "non-saturating"


@dataclass
class OutputConfig:
    """How often what is written, in optimizer steps. The last step always writes everything."""

    log_every: int = 10
    eval_every: int = 325
    picture_every: int = 325
    checkpoint_every: int = 325
    keep: int = 2  # checkpoints
    pictures: int = 24  # held-out crops shown in a picture
    tensorboard: bool = True
    progress: bool = True
