"""A small classifier of what captions say: it learns from real pictures, and judges drawn ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext.train.data import DataError

_WIDTHS = (24, 48, 96)
_BATCH = 64
_LEAST = 300  # steps


def attributes(pattern: str, captions: Sequence[str]) -> list[dict[str, str]]:
    """What each caption says, by the names of the pattern's groups.

    Args:
        pattern: a regular expression of whole captions with named groups, such as
            ``a (?P<colour>\\w+) (?P<shape>\\w+)``.

    Raises:
        DataError: no such pattern, or a caption that it does not match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"{pattern!r} is no regular expression: {error}") from error
    if not compiled.groupindex:
        raise DataError(f"{pattern!r} names nothing: it needs groups as in (?P<colour>...)")
    found = []
    for caption in captions:
        match = compiled.fullmatch(caption)
        if match is None or None in match.groupdict().values():
            raise DataError(f"the caption {caption!r} is not of the form {pattern!r}")
        found.append(match.groupdict())
    return found


class Judge(nn.Module):
    """Pictures to the words of each attribute.

    Args:
        words: of each attribute, in the order of its classes.
    """

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.words = {name: list(values) for name, values in words.items()}
        layers: list[nn.Module] = []
        before = 3
        for width in _WIDTHS:
            layers += [
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * before, len(values)) for name, values in self.words.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, S, S] in [-1, 1] -> logits [B, words] of each attribute."""
        maps = self.trunk(images)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def judge(self, images: Tensor) -> list[dict[str, str]]:
        """The likeliest words for each picture [N, 3, S, S] in [-1, 1]."""
        self.eval()
        found: list[dict[str, str]] = []
        for part in images.split(_BATCH):
            best = {name: logits.argmax(1).tolist() for name, logits in self(part).items()}
            found += [
                {name: self.words[name][chosen[i]] for name, chosen in best.items()}
                for i in range(len(part))
            ]
        return found


def train_judge(
    images: Tensor, said: Sequence[Mapping[str, str]], rounds: int = 12, seed: int = 0
) -> Judge:
    """A judge of pictures [N, 3, S, S] in [-1, 1] with what their captions say.

    Pictures are mirrored, blurred and roughened by chance (:func:`_varied`), so that it looks at
    shapes and colours and not at how clean an edge is. The global generator of random numbers is
    left as it was.

    Args:
        rounds: over the pictures; more where they are few.
    """
    names = list(said[0])
    words = {name: sorted({one[name] for one in said}) for name in names}
    targets = {name: torch.tensor([words[name].index(one[name]) for one in said]) for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(words).train()
        optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=1e-2)
        in_a_round = -(-len(images) // _BATCH)
        rounds = max(rounds, -(-_LEAST // in_a_round))
        steps = rounds * in_a_round
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(rounds):
            for chosen in torch.randperm(len(images)).split(_BATCH):
                logits = judge(_varied(images[chosen]))
                loss = torch.stack(
                    [F.cross_entropy(logits[name], targets[name][chosen]) for name in names]
                ).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return judge.eval()


def _varied(images: Tensor) -> Tensor:
    """Mirrored half of the time, mostly smaller by a factor of up to 4 and large again, and with
    noise of a deviation of up to 0.15."""
    if torch.rand(()) < 0.5:
        images = images.flip(3)
    side = images.shape[-1]
    if torch.rand(()) < 0.8:
        small = int(torch.randint(max(1, side // 4), side + 1, ()))
        smaller = F.interpolate(images, (small, small), mode="bilinear", antialias=True)
        images = F.interpolate(smaller, (side, side), mode="bicubic")
    return images + 0.15 * torch.rand(()) * torch.randn_like(images)


def shares(
    said: Sequence[Mapping[str, str]], found: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """How often each attribute agrees, and how often all do ("all")."""
    count = max(1, len(said))
    names = list(said[0]) if said else []
    agree = {
        name: sum(a[name] == b[name] for a, b in zip(said, found, strict=True)) / count
        for name in names
    }
    every = sum(dict(a) == dict(b) for a, b in zip(said, found, strict=True)) / count
    return {**agree, "all": every}
