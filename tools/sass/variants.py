"""What other arithmetic would make of the coarse scores: nothing of this is built.

Each row takes the counted cycles of the present loop and changes those that the other arithmetic
would: the products, and what it needs beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import programs
from .devices import A100, DEVICES, H100, Device
from .estimates import Change, Counts
from .examples import CODES, SEARCHED, coarse_score, refine
from .occupancy import WARP
from .report import Table

#: Thousands of scores of the program of the coarse scores: 64 rows and a tile.
_UNITS = 64 * programs.TILE / 1024
#: Codes of a row within the bound of 8-bit coarse scores, of 32,768 Gaussian ones: counted on the
#: CPU (measurements.md). The records with two of them, where they are spread evenly.
INT8_CODES, INT8_RECORDS = 4.2, 0.13


@dataclass(frozen=True)
class Variant:
    """Another arithmetic: how it changes cycles, and what it leaves to refine."""

    name: str
    devices: tuple[Device, ...]
    change: Callable[[Device], Change]
    warpgroups: bool = False  # by the kernel for them: products run beside other instructions
    near: float = 1 + programs.SECOND_GROUPS
    rescored: float = 0


def _products(columns: int, rate: float = 1) -> Callable[[Device], Change]:
    """Products of so many columns, at `rate` times that of half precision."""

    def of(device: Device) -> Change:
        each = 1024 * columns / (rate * device.mma_share * device.sm.tensor_multiply_adds)
        return lambda taken: taken | {"tensor": _UNITS * each}

    return of


def _own_starts(device: Device) -> Change:
    """40 columns; a lane multiplies each sum's start by its row's factor."""
    products = _products(40)(device)

    def change(taken: dict[str, float]) -> dict[str, float]:
        extra = _UNITS * 1024 / WARP
        lanes = extra * WARP / device.sm.float32_lanes
        more = {"issue": taken["issue"] + extra, "float32": taken["float32"] + lanes}
        return products(taken) | more

    return change


VARIANTS = (
    Variant("as it is, 30 to 45 channels", DEVICES, lambda _: lambda taken: taken),
    Variant(
        "int8, mma of 32 and 16 columns",
        (A100,),
        _products(48, rate=2),
        near=INT8_CODES,
        rescored=INT8_RECORDS,
    ),
    Variant("wgmma, 30 to 45 channels", (H100,), lambda _: lambda taken: taken, warpgroups=True),
    Variant("40 columns, one start for all rows", DEVICES, _products(40)),
    Variant("40 columns, a start for each row", DEVICES, _own_starts),
    Variant("32 columns, one start for all rows", DEVICES, _products(32)),
)


def _estimate(variant: Variant, counts: Counts, device: Device) -> tuple[float, float, float]:
    """Microseconds of the coarse scores, at least and at most, and of refine."""
    change = variant.change(device)
    launches = coarse_score((SEARCHED,), device, variant.warpgroups)
    times = [counts.times(launch, change) for launch in launches]
    least = sum(t.least for t in times)
    most = least if variant.warpgroups else sum(t.most for t in times)
    after = refine((SEARCHED,), device, variant.near, variant.rescored)
    return least, most, sum(counts.times(launch).least for launch in after)


def variant_table(counts: Mapping[Device, Counts]) -> Table:
    """The search's coarse scores and refine by each arithmetic, on the devices that have it."""
    work = 2e-6 * SEARCHED * CODES * programs.CHANNELS
    rows = []
    for variant in VARIANTS:
        row = [variant.name]
        for device in DEVICES:
            if device not in variant.devices:
                row += ["-"] * 3
                continue
            least, most, after = _estimate(variant, counts[device], device)
            rates = f"{work / (most + after):,.0f} to {work / (least + after):,.0f}"
            same = f"{least:,.0f}" == f"{most:,.0f}"
            row += [
                f"{least:,.0f}" if same else f"{least:,.0f} to {most:,.0f}",
                f"{after:,.0f}",
                f"{work / (least + after):,.0f}" if same else rates,
            ]
        rows.append(row)
    header = ["arithmetic"]
    for device in DEVICES:
        header += [f"{device.name}: coarse scores, us", "refine, us", "TFLOP/s of both"]
    return Table(f"A search of {SEARCHED:,} rows by other arithmetic", header, rows)
