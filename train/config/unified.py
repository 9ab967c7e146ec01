"""Configuration of a training both ways: drawing from captions, and answering about pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.sampler import SamplingConfig

from .checks import check_captions, check_streams, one_of
from .text_to_image import CaptionConfig
from .understanding import PARTS, UnderstandingConfig, UnderstandingModelConfig

WAYS = ("answering", "drawing")


@dataclass
class UnifiedModelConfig(UnderstandingModelConfig):
    """The model: the transformer of text to image, which reads pictures too."""

    prompt_length: int = 24  # ids that a caption is cut or padded to


@dataclass
class UnifiedConfig(UnderstandingConfig):
    """Everything that decides a run of ``train/unified.py``.

    A step learns from ``optim.batch`` conversations of ``data`` and as many pairs of ``drawing``;
    its loss is the sum of both. Where ``drawing.unseen`` holds captions out, conversations about
    pictures with such a caption are held out too, and so are those about pictures without one,
    which might have it.
    """

    run: str = "runs/unified"
    ways: tuple[str, ...] = WAYS  # one of the two trains that one alone, for comparisons
    drawing: CaptionConfig = field(default_factory=CaptionConfig)
    model: UnifiedModelConfig = field(default_factory=UnifiedModelConfig)
    sample: SamplingConfig = field(default_factory=SamplingConfig)  # of the run's pictures

    def __post_init__(self) -> None:
        super().__post_init__()
        check_captions(self.drawing, "drawing")
        check_streams(self.drawing.streams, "drawing")
        for way in self.ways:
            one_of("ways", way, *WAYS)
        if not self.ways:
            raise ConfigError("ways must name one or both, got none")
        if set(self.model.trained) != set(PARTS):
            raise ConfigError(
                f"model.trained must be {', '.join(PARTS)}: both ways are of all of the model"
            )
        if self.parallel != "ddp":
            raise ConfigError("parallel=fsdp is not for training both ways: use ddp")
        if self.model.lora.rank:
            raise ConfigError("model.lora is not for training both ways")
