"""The devices that times are estimated for."""

from __future__ import annotations

from dataclasses import dataclass

from .occupancy import MULTIPROCESSORS, Multiprocessor

#: Bytes a cycle from the L2: NVIDIA A100 Tensor Core GPU Architecture (white paper, V1.0). Assumed
#: of H100 too, whose white paper names none.
L2_BYTES_CYCLE = 5120
#: Assumed: cycles from a load that the L2 answers to the first instruction that needs it.
L2_CYCLES = 260
#: Assumed: cycles from an instruction to one that needs its result.
DEPENDENT_CYCLES = 4
#: Taken from times of the sampler on an H100 (measurements.md): with k = 1,200 a row takes 16 us
#: more than with k = 1, in the 45 steps that ended in a barrier.
BARRIER_CYCLES = 640
#: Assumed: microseconds of the shortest kernel.
LEAST_MICROSECONDS = 2.0


@dataclass(frozen=True)
class Device:
    """Peak rates of a device, and what is known or assumed of how much of them is reached."""

    name: str
    architecture: str
    multiprocessors: int
    gigahertz: float  # at which the tensor cores' peak is named
    memory_bandwidth: float  # bytes a second, peak
    copy_bandwidth: float  # of a copy, read and written
    mma_share: float  # of the tensor cores' peak that `mma.sync` reaches
    source: str

    @property
    def sm(self) -> Multiprocessor:
        return MULTIPROCESSORS[self.architecture]

    @property
    def cycles_microsecond(self) -> float:
        return 1e3 * self.gigahertz

    @property
    def tensor_flops(self) -> float:
        """Operations a second of the tensor cores in half precision, dense: the peak."""
        return 8e9 * self.multiprocessors * self.sm.tensor_multiply_adds * self.gigahertz


A100 = Device(
    "A100 SXM 80 GB",
    "sm_80",
    multiprocessors=108,
    gigahertz=1.41,
    memory_bandwidth=2039e9,
    copy_bandwidth=0.88 * 2039e9,
    mma_share=1.0,
    source="NVIDIA A100 Tensor Core GPU datasheet: 312 TFLOP/s, 2,039 GB/s. Assumed: `mma` reaches "
    "the peak, a copy 0.88 of the bandwidth, as on the H100",
)
H100 = Device(
    "H100 SXM 80 GB",
    "sm_90a",
    multiprocessors=132,
    gigahertz=1.83,
    memory_bandwidth=3352e9,
    copy_bandwidth=2950e9,
    mma_share=0.62,
    source="NVIDIA H100 Tensor Core GPU datasheet: 989.4 TFLOP/s, 3.35 TB/s. Copy as measured "
    "(measurements.md). Assumed: `mma` reaches 0.62 of the peak, as Luo et al. (arXiv 2402.13499) "
    "report for an H800, and `wgmma` all of it",
)
DEVICES = (A100, H100)
