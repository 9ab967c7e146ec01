"""Crops of images: random ones to train on, fixed ones to evaluate on and to show."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.metrics import code_usage, cosine, psnr
from tokenflow_ext.train import data
from tokenflow_ext.train.config import DataConfig
from tokenflow_ext.train.data.images import open_images
from tokenflow_ext.train.engine.distributed import Processes


class CropData:
    """The images of a run that learns to reconstruct them.

    Args:
        config: the section ``data`` of the run.
        size: side of a crop in pixels.
        seed: of the run.
        partition: this process's part of each batch.

    Attributes:
        dataset: random crops [3, S, S] in [-1, 1], by number.
        held_out: crops [B, 3, S, S] of images that are never trained on.
    """

    def __init__(
        self, config: DataConfig, size: int, seed: int, partition: data.BatchPartition
    ) -> None:
        self.partition = partition
        source, held_out = open_images(config, partition.batch // partition.accumulate, seed)
        self.dataset = data.RandomCrops(source, size, config, seed)
        self._held_out_names = list(data.listing(held_out))
        self.held_out = data.held_out_crops(held_out, size, config.held_out_crops)

    def batches(self, position: int, workers: int = 0) -> Iterator[Tensor]:
        """This process's micro-batches of crops from a data position on.

        Args:
            workers: processes that decode images.
        """
        return iter(data.loader(self.dataset, self.partition, position, workers))

    def listing(self) -> Iterator[str]:
        """Names of all images."""
        yield from self.dataset.source.listing()
        yield from self._held_out_names

    def some_held_out(self, count: int) -> Tensor:
        """At most ``count`` held-out crops, spread over the set."""
        count = min(count, len(self.held_out))
        which = torch.linspace(0, len(self.held_out) - 1, count).round().long()
        return self.held_out[which]

    def evaluate(
        self,
        model: TokenFlowTokenizer,
        group: Processes,
        teacher: torch.nn.Module | None = None,
    ) -> dict[str, float]:
        """How well the held-out crops are reconstructed: PSNR in dB (mean over images) with a pixel
        branch, cosine of decoded and teacher's tokens with a teacher, share of the codes in use and
        their perplexity, and by scale the share of codes in use, of as many as its tokens could use
        at most, and by group where each has an index of its own (every process calls this).

        Args:
            model: in evaluation.
        """
        local = self.partition.local
        codes = model.quantizer.num_codes
        tokens = model.quantizer.tokens_per_scale
        hits = torch.zeros(len(tokens), codes, dtype=torch.int64, device=group.device)
        sums = torch.zeros(3, dtype=torch.float64, device=group.device)
        for start in range(0, len(self.held_out), local * group.world):
            # A process without a share still takes part: its weights may be needed elsewhere.
            own = self.held_out[start : start + local * group.world][group.rank :: group.world]
            images = (own if len(own) else self.held_out[:1]).to(group.device)
            out = model(images)
            if len(own):
                numbers = model.quantizer.code_numbers(out.quantizer.indices)
                for own_hits, part in zip(hits, numbers.split(tokens, dim=1), strict=True):
                    own_hits += torch.bincount(part.flatten(), minlength=codes)
                if out.images is not None:
                    sums[0] += psnr(out.images, images, reduction="none").double().sum()
                if teacher is not None:
                    close = cosine(out.semantic, teacher(images)).double()
                    sums[1] += close * len(images)
                sums[2] += len(images)
        group.sum_(hits)
        group.sum_(sums)
        values = {}
        if model.config.pixel.enabled:
            values["psnr"] = (sums[0] / sums[2]).item()
        if teacher is not None:
            values["cosine"] = (sums[1] / sums[2]).item()
        values["usage"], values["perplexity"] = code_usage(hits.sum(0))
        most = hits.sum(1).clamp(max=codes)
        by_scale = ((hits > 0).sum(1) / most).tolist()
        values |= {f"usage_scale_{i}": share for i, share in enumerate(by_scale, start=1)}
        groups = hits.sum(0).split(model.quantizer.codes_per_group)
        if len(groups) > 1:
            for i, group_hits in enumerate(groups, start=1):
                values[f"usage_group_{i}"], values[f"perplexity_group_{i}"] = code_usage(group_hits)
        return values


#: Of :meth:`CropData.evaluate`, for the summary.
METRICS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "cosine": ("cosine to the teacher", "{:.3f}"),
    "usage": ("codes in use", "{:.1%}"),
    "perplexity": ("perplexity of the codes", "{:.0f}"),
}
