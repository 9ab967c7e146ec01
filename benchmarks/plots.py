"""The tables as pictures, PNG and SVG. The only module that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from benchmarks.roofline import BYTE_PRODUCT, COPY, Work
from benchmarks.tables import Record, ceiling_rates, multiple

mpl.use("Agg")
mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "figure.dpi": 110,
        "svg.hashsalt": "tokenflow_ext",  # the same results give the same file
    }
)
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a back end
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

OURS, OTHERS, TEXT = "#0b5fa5", "#8a8f98", "#30343b"


@dataclass(frozen=True)
class Panel:
    """Candidates: for each a value and how many times ours it is, or why there is none."""

    title: str
    values: dict[str, tuple[float, float] | str]


def quantizer_panels(records: Sequence[Record], quantity: str, unit: float) -> list[Panel]:
    """A panel for each case."""
    return [
        Panel(
            f"{record['pyramid']}, K = {record['codebook_size']:,}, {record['mode']}",
            _values(record, quantity, unit),
        )
        for record in records
    ]


def search_panels(records: Sequence[Record]) -> list[Panel]:
    """A panel for each codebook."""
    return [
        Panel(
            f"{record['rows']:,} rows, K = {record['codebook_size']:,}",
            _values(record, "seconds", 1e-3),
        )
        for record in records
    ]


def _values(record: Record, quantity: str, unit: float) -> dict[str, tuple[float, float] | str]:
    return {
        name: result.get("left_out") or (result[quantity] / unit, multiple(record, name, quantity))
        for name, result in record["results"].items()
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _plain(value: float, _position: object) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def compare(panels: Sequence[Panel], title: str, unit: str, columns: int = 2) -> Figure:
    """Each panel's values on one logarithmic axis, with the multiple of ours beside them."""
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(panel.values) for panel in panels)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(5.6 * columns, 0.9 + lines * (0.75 + 0.27 * most)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    numbers = [v[0] for panel in panels for v in panel.values.values() if not isinstance(v, str)]
    left, right = min(numbers) / 1.6, max(numbers)
    for panel, axis in zip(panels, axes.flat, strict=False):
        _compare(axis, panel, left, unit)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    # A label takes about a third of a panel.
    axes.flat[0].set_xlim(left, right * (right / left) ** 0.55)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel(f"{unit} (logarithmic)")
        axis.tick_params(labelbottom=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _compare(axis: Axes, panel: Panel, left: float, unit: str) -> None:
    names = list(panel.values)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(_plain))
    axis.minorticks_off()
    for place, name in enumerate(names):
        entry, color = panel.values[name], OURS if name == "ours" else OTHERS
        if isinstance(entry, str):
            axis.annotate(entry, (left, place), (4, 0), textcoords="offset points", va="center")
            continue
        value, times_ours = entry
        axis.hlines(place, left, value, color=color, linewidth=5)
        label = f"{_number(value)} {unit}"
        if name != "ours":
            label += f"  ({_number(times_ours)}\N{MULTIPLICATION SIGN})"
        axis.annotate(
            label, (value, place), (5, 0), textcoords="offset points", va="center", color=TEXT
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.set_title(panel.title)


def roofline(records: Sequence[Record], title: str) -> Figure:
    """Operations a byte against rate, below the best rates of the ceilings in the same run."""
    figure, axis = plt.subplots(figsize=(11, 5.6), layout="constrained")
    rates = {name: max(samples) for name, samples in ceiling_rates(records).items()}
    copy = rates.pop(COPY)
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        work, results = Work(**record["work"]), record["results"]
        kind = record.get("mode", "search alone")
        point = (work.intensity, work.operations / results["ours"]["seconds"] / 1e9)
        groups.setdefault(("ours", kind), []).append(point)
        if kind == "forward":
            # The eager form writes and reads a float32 score for each row and code.
            intensity = work.operations / (work.bytes + 8 * record["scores"])
            eager = results["eager"]
            if not eager.get("left_out"):
                point = (intensity, work.operations / eager["seconds"] / 1e9)
                groups.setdefault(("eager", kind), []).append(point)

    points = [point for group in groups.values() for point in group]
    left = min(1.0, min(x for x, _ in points) / 2)
    right = max(x for x, _ in points) * 4
    above = float("inf")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        if name.endswith("1 thread"):
            continue
        operations = "Gop/s" if name == BYTE_PRODUCT else "GFLOP/s"
        axis.plot([rate / copy, right], [rate / 1e9] * 2, color=TEXT, linewidth=1)
        crowded = above < 1.5 * rate
        axis.annotate(
            f"{name}: {rate / 1e9:,.0f} {operations}",
            (right, rate / 1e9),
            (4, -6 if crowded else 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=TEXT,
        )
        above = rate
    top = max(rates.values())
    axis.plot([left, top / copy], [left * copy / 1e9, top / 1e9], color=TEXT, linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    lowest = min(min(y for _, y in points), left * copy / 1e9)
    axis.set_ylim(lowest / 1.5, max(top / 1e9, *(y for _, y in points)) * 2)
    axis.annotate(
        f"copy: {copy / 1e9:,.1f} GB/s",
        (left, left * copy / 1e9),
        (8, -2),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color=TEXT,
    )
    markers = {"forward": "o", "forward+backward": "s", "search alone": "^"}
    for (name, kind), group in groups.items():
        label = f"{name}, {kind}"
        if name == "eager":
            label += ", its score matrix counted as memory traffic"
        axis.scatter(
            *zip(*group, strict=True),
            marker=markers[kind],
            color=OURS if name == "ours" else OTHERS,
            edgecolors="white",
            s=70,
            label=label,
            zorder=3,
        )
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(FuncFormatter(_plain))
    axis.set_xlabel("operations a byte that has to move (FLOP/byte)")
    axis.set_ylabel("2 N K 40 over time (GFLOP/s)")
    figure.legend(loc="outside lower left", frameon=False, ncols=2, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes name.png and name.svg."""
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
