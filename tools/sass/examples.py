"""The examples that times are estimated of, and their tables for docs/kernels.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from . import programs
from .devices import DEVICES, H100, Device
from .estimates import Counts, Launch, Line
from .report import Table

CODES = 32768
B = (1, 2, 4, 6, 8, 10, 12, 14)
XL = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
BATCH = 32
SEARCHED, DRAWN = 23328, 4096
ROWS_AT_ONCE = 16384
#: Where the figures of docs/measurements.md are from.
COMMIT = "71c4920"

_PACKED_BYTES = 2 * 16 * programs.STEPS  # of a packed vector
_VECTOR_BYTES = 4 * programs.CHANNELS


def _padded(rows: int) -> int:
    return -(-rows // 256) * 256 if rows > 128 else 128


def _records(rows: int) -> int:
    """Of a row: few rows have shorter ones, so that there are blocks enough."""
    tiles = CODES // programs.TILE
    return tiles if rows <= 1024 else CODES // programs.RECORD


def _chunks(rows: int) -> list[int]:
    """Rows of each launch of the search."""
    return [min(ROWS_AT_ONCE, rows - first) for first in range(0, rows, ROWS_AT_ONCE)]


def coarse_score(scales: Sequence[int], _: Device, warpgroups: bool = False) -> list[Launch]:
    """Launches of the coarse scores of searches of so many rows."""
    program, warp_rows = programs.coarse_score(), 64
    if warpgroups:
        program, warp_rows = programs.warpgroup_score(), 16
    return [
        Launch(
            program,
            _padded(rows) // warp_rows * (CODES // programs.TILE),
            256 // warp_rows,
            l2_bytes=_PACKED_BYTES * CODES * (_padded(rows) // 128 // (2 if rows > 128 else 1))
            + 8 * rows * _records(rows),
            balanced=True,
        )
        for scale in scales
        for rows in _chunks(scale)
    ]


def refine(
    scales: Sequence[int],
    _: Device,
    near: float = 1 + programs.SECOND_GROUPS,
    rescored: float = 0,
) -> list[Launch]:
    """Launches that decide between the codes: a warp a row."""
    # A group's codes with reciprocal lengths and biases; the row twice, and the code found.
    groups = programs.GROUP * near * (_VECTOR_BYTES + 8 * programs.GROUPS + 8)
    return [
        Launch(
            programs.refine(_records(rows), near, rescored),
            rows,
            4,
            l2_bytes=rows * (8 * 2 * _records(rows) + groups + 3 * _VECTOR_BYTES + 64),
        )
        for scale in scales
        for rows in _chunks(scale)
    ]


def pack(scales: Sequence[int], _: Device) -> list[Launch]:
    """Packs rows, eight a warp, and in the first launch the codes beside them."""
    each = _VECTOR_BYTES + _PACKED_BYTES + 8 * programs.GROUPS + 20
    found = [Launch(programs.pack_codes(), CODES // 8, 4, memory_bytes=CODES * each)]
    return found + [
        Launch(programs.pack_rows(), -(-rows // 256) * 256 // 8, 4, l2_bytes=rows * each)
        for rows in scales
    ]


def _plane_channels(dim: int) -> int:
    """`choose_channels`: the most that leave 256 blocks; planes here are small enough."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or BATCH * -(-dim // n) >= 256)


def residual_pass(sides: Sequence[int], _: Device) -> list[Launch]:
    """Launches before the first scale, between scales, and after the last."""
    side, channels = sides[-1], _plane_channels(programs.CHANNELS)
    blocks = BATCH * -(-programs.CHANNELS // channels)
    planes = BATCH * _VECTOR_BYTES * side * side
    return [
        Launch(
            programs.residual_pass(channels, side, scale, pooled),
            blocks * programs.PLANE_WARPS,
            programs.PLANE_WARPS,
            # The plane and f^ read and written, rows written, codes read.
            l2_bytes=(4 if scale else 2) * planes
            + BATCH * _VECTOR_BYTES * (scale * scale + pooled * pooled),
        )
        for scale, pooled in zip((0, *sides), (*sides, 0), strict=True)
    ]


def row_gradient(sides: Sequence[int], _: Device) -> list[Launch]:
    """One launch for the tokens of all scales."""
    tokens = [side * side for side in sides]
    mean = sum(number * count for number, count in enumerate(tokens)) / sum(tokens)
    count = BATCH * sum(tokens)
    # Rows, f^'s gradient and codes read, both gradients written.
    return [
        Launch(
            programs.row_gradient(mean),
            -(-count // 4),
            8,
            memory_bytes=count * (5 * _VECTOR_BYTES + 8),
        )
    ]


def sample(rows: int, _: Device) -> list[Launch]:
    """A block a row."""
    logits = 2 * 4 * rows * CODES  # with guidance
    warps = programs.SAMPLER_THREADS // 32
    candidates = 2 * 32 * rows * programs.CANDIDATES  # sectors of both inputs, again
    program = programs.sampler(CODES)
    return [Launch(program, warps * rows, warps, l2_bytes=candidates, memory_bytes=logits)]


SCALAR_SCALES, SCALAR_CHANNELS = (1, 2, 4, 8, 16), 16


def scalar_quantize(_: Device) -> list[Launch]:
    """Signs of 16 channels along a pyramid, one launch."""
    channels, side = _plane_channels(SCALAR_CHANNELS), SCALAR_SCALES[-1]
    tokens = sum(scale * scale for scale in SCALAR_SCALES)
    elements = BATCH * SCALAR_CHANNELS
    return [
        Launch(
            programs.scalar_quantize(channels, side, SCALAR_SCALES),
            elements // channels * programs.PLANE_WARPS,
            programs.PLANE_WARPS,
            memory_bytes=elements * (8 * side * side + 6 * tokens),
        )
    ]


def _rows(sides: Sequence[int]) -> tuple[int, ...]:
    return tuple(BATCH * side * side for side in sides)


def lines() -> list[Line]:
    """All examples, with what was measured of them."""
    search, b, xl = f"search, {SEARCHED:,} rows", "B, batch 32", "XL, batch 32"
    found = [
        Line(search, "coarse_score", partial(coarse_score, (SEARCHED,)), {H100.name: "202"}),
        Line(search, "refine", partial(refine, (SEARCHED,)), {H100.name: "45"}),
        Line(search, "pack", partial(pack, _chunks(SEARCHED)), {H100.name: "21"}),
    ]
    measured = {"coarse_score": "648", "refine": "237", "pack": "84", "residual_pass": "233"}
    for name, sides in ((b, B), (xl, XL)):
        rows = _rows(sides)
        for kernel, launches in (
            ("coarse_score", partial(coarse_score, rows)),
            ("refine", partial(refine, rows)),
            ("pack", partial(pack, rows)),
            ("residual_pass", partial(residual_pass, sides)),
            ("row_gradient", partial(row_gradient, sides)),
        ):
            figure = measured.get(kernel) if name == xl else None
            found.append(Line(name, kernel, launches, {H100.name: figure} if figure else {}))
    drawn = f"{DRAWN:,} rows of float32, guidance"
    found.append(Line(drawn, "sample", partial(sample, DRAWN), {H100.name: "969"}))
    found.append(
        Line("signs, 16 channels, 16 x 16, batch 32", "scalar_quantize", scalar_quantize, {})
    )
    return found


def _range(least: float, most: float) -> str:
    a, b = f"{least:,.0f}", f"{most:,.0f}"
    return a if a == b else f"{a} to {b}"


def _measured(figures: dict[str, str], device: Device) -> str:
    return f"{figures[device.name]} ({COMMIT})" if device.name in figures else "not measured"


MANY = 1 << 20  # iterations, beside which what is run once for all of them does not show


def count_table(counts: Mapping[Device, Counts]) -> Table:
    """What a warp issues for a unit of each kernel's work."""
    units = [
        ("coarse_score", "1,024 scores", programs.coarse_score(), 64 * programs.TILE / 1024),
        ("refine", "a row", programs.refine(CODES // programs.RECORD), 1.0),
        ("pack", "a row of 40 channels", programs.pack_rows(), 8.0),
        ("pack", "a code of 40 channels", programs.pack_codes(), 8.0),
        ("residual_pass", "32 elements of planes along y", programs.along_y(MANY), MANY),
        ("row_gradient", "a token of 40 channels", programs.row_gradient(0), 4.0),
        ("sample", "32 keys", programs.sampler_keys(512 * MANY), MANY),
        ("sample", "32 half keys looked through", programs.sampler_list(512 * MANY), MANY),
    ]
    rows = []
    for kernel, unit, program, number in units:
        row = [kernel, unit]
        for device in DEVICES:
            taken = counts[device].cycles(program)
            lanes = {pipe: taken[pipe] / number for pipe in taken if pipe != "issue"}
            busiest = max(lanes, key=lambda pipe: lanes[pipe])
            row += [f"{taken['issue'] / number:,.1f}", f"{lanes[busiest]:,.1f} {busiest}"]
        rows.append(row)
    header = ["kernel", "for"]
    for device in DEVICES:
        header += [f"{device.architecture}: instructions", "most cycles of lanes"]
    return Table("Counted, of a warp", header, rows)


def time_table(counts: Mapping[Device, Counts]) -> Table:
    """Estimated and measured times."""
    rows = []
    for line in lines():
        row = [line.kernel, line.example]
        for device in DEVICES:
            least, most, binds = line.estimate(counts[device], device)
            row += [_range(least, most), binds]
            row.append(_measured(line.measured, device))
        rows.append(row)
    header = ["kernel", "example"]
    for device in DEVICES:
        header += [f"{device.name}: us", "bound by", "measured"]
    return Table("Estimated", header, rows)


def rate_table(counts: Mapping[Device, Counts]) -> Table:
    """The rates that the times amount to."""
    search = [line for line in lines() if line.example.startswith("search")]
    sampler = [line for line in lines() if line.kernel == "sample"]
    flops = 2e-6 * SEARCHED * CODES * programs.CHANNELS  # TFLOP/s of a microsecond
    rates: list[tuple[str, str, list[Line], Callable[[Device, float], str], dict[str, str]]] = [
        (
            "coarse_score",
            "TFLOP/s as 2 N K 40",
            search[:1],
            lambda _, us: f"{flops / us:,.0f}",
            {H100.name: f"{flops / 202:,.0f}"},
        ),
        (
            "search",
            "TFLOP/s as 2 N K 40, without measuring",
            search,
            lambda _, us: f"{flops / us:,.0f}",
            {H100.name: "204 with it"},
        ),
        (
            "sample",
            "of a copy of the logits' bytes",
            sampler,
            lambda device, us: f"{8e6 * DRAWN * CODES / device.copy_bandwidth / us:.0%}",
            {H100.name: "37%"},
        ),
    ]
    rows = []
    for kernel, rate, chosen, form, measured in rates:
        row = [kernel, rate]
        for device in DEVICES:
            times = [line.estimate(counts[device], device) for line in chosen]
            least, most = (form(device, sum(t[i] for t in times)) for i in (0, 1))
            row.append(least if least == most else f"{most} to {least}")
            row.append(_measured(measured, device))
        rows.append(row)
    header = ["kernel", "rate"]
    for device in DEVICES:
        header += [device.name, "measured"]
    return Table("Rates that the times amount to", header, rows)
