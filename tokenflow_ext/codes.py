"""What a quantizer's codes are: small descriptions that `tokenflow_ext.Quantizer` is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from . import scalar


@dataclass(frozen=True)
class _Rows:
    """Codes that are rows of a table: what `Table` and `Projected` share."""

    size: int
    dim: int
    l2_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "dim"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} of {type(self).__name__} must be at least 1, got {value}")

    @property
    def bits(self) -> float:
        """Information of a token, in bits."""
        return math.log2(self.size)


@dataclass(frozen=True)
class Table(_Rows):
    """A learned codebook (VQ-VAE, arXiv 1711.00937).

    Args:
        size: codes K.
        dim: channels D.
        l2_norm: rows and codes at unit length (arXiv 2110.04627).
        weight: of the distance beside other tables that share the index.

    Raises:
        ValueError: a number out of its range.
    """

    weight: float = 1.0


@dataclass(frozen=True)
class Projected(_Rows):
    """A frozen random table behind a learned linear layer (SimVQ, arXiv 2411.02038).

    Args:
        size: codes K.
        dim: channels D.
        l2_norm: rows and projected codes at unit length.
        bias: whether the layer has one, as the original's has.

    Raises:
        ValueError: a number out of its range.
    """

    bias: bool = True


@dataclass(frozen=True)
class Signs:
    """The sign of each channel (LFQ, arXiv 2310.05737).

    Args:
        dim: channels D, of 2^D codes; 0 counts as negative.
        spherical: rows and codes at unit length, the values 1 / sqrt(D) (BSQ, arXiv 2406.07548).
        little_endian: the first channel is the lowest bit of an index, as in Open-MAGVIT2; else the
            highest, as in vector-quantize-pytorch and Infinity.

    Raises:
        ValueError: more channels than an index holds bits.
    """

    dim: int
    spherical: bool = False
    little_endian: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.dim <= 63:
            raise ValueError(f"dim of Signs must be 1 to 63, the bits of an index, got {self.dim}")

    @property
    def size(self) -> int:
        """Number of codes."""
        return 1 << self.dim

    @property
    def bits(self) -> float:
        """Information of a token, in bits."""
        return float(self.dim)

    @property
    def counts(self) -> tuple[int, ...]:
        """Values of each channel."""
        return (2,) * self.dim


@dataclass(frozen=True)
class Levels:
    """Each channel rounded to one of a few levels (FSQ, arXiv 2309.15505).

    Args:
        levels: of each channel, as (8, 8, 8, 6, 5).
        bound: how a number comes to the range of the levels, see `scalar.levels`.

    Raises:
        ValueError: levels or a bound that do not exist, or more codes than an index holds.
    """

    levels: Sequence[int]
    bound: scalar.Bound = "tanh"

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(int(count) for count in self.levels))
        scalar.check_levels(self.levels, self.bound)
        if self.size > 1 << 63:
            raise ValueError(f"levels must have at most 2^63 codes, got {list(self.levels)}")

    @property
    def dim(self) -> int:
        """Channels."""
        return len(self.levels)

    @property
    def size(self) -> int:
        """Number of codes."""
        return math.prod(self.levels)

    @property
    def bits(self) -> float:
        """Information of a token, in bits."""
        return math.log2(self.size)

    @property
    def counts(self) -> tuple[int, ...]:
        """Values of each channel."""
        return tuple(self.levels)


@dataclass(frozen=True)
class Entropy:
    """A loss of the choice of a code: weight (mean entropy of a row's choice - gamma entropy of the
    mean choice), the choice being a softmax over codes (LFQ, arXiv 2310.05737, eq. 5).

    Args:
        weight: of the loss.
        temperature: that scores are divided by.
        gamma: of the codebook's entropy.
        factorized: of signs, the codebook's entropy as the sum of the channels' (BSQ), which is the
            only one beyond 24 channels.
        eps: what the logarithm of the mean choice keeps away from 0.

    Raises:
        ValueError: a temperature that is not positive.
    """

    weight: float
    temperature: float = 0.01
    gamma: float = 1.0
    factorized: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


Code = Table | Projected | Signs | Levels
BitOrder = Literal["little", "big"]
