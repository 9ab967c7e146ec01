"""Results of a run as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import IMPLEMENTATIONS
from benchmarks.roofline import (
    BYTE_PRODUCT,
    COPY,
    Work,
    arithmetic_ceilings,
    least_seconds,
)
from benchmarks.samplers import SAMPLERS
from benchmarks.searches import SEARCHES

Record = dict[str, Any]
"""What one benchmark found; test_quantizer.py and test_search.py say what is in it."""

MEMORY = {
    "cpu": "resident memory of a fresh process",
    "cuda": "what torch's allocator handed out",
}


@dataclass(frozen=True)
class Table:
    """A Markdown table with a note below it."""

    title: str
    rows: list[dict[str, str]]
    note: str

    def lines(self) -> list[str]:
        """The table with its columns aligned."""
        header = list(self.rows[0])
        cells = [header, *([row[column] for column in header] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        return [
            "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]


def ceiling_rates(records: Sequence[Record]) -> dict[str, list[float]]:
    """All samples of each ceiling in a run."""
    rates: dict[str, list[float]] = {}
    for record in records:
        for name, samples in record["ceilings"].items():
            rates.setdefault(name, []).extend(samples)
    return rates


def tables(
    records: Sequence[Record], missing_ceilings: dict[str, str], meanings: dict[str, str]
) -> list[Table]:
    """Everything measured on one device; tables with no rows are left out."""
    quantizer = [record for record in records if record["kind"] == "quantizer"]
    search = [record for record in records if record["kind"] == "search"]
    sampler = [record for record in records if record["kind"] == "sampler"]
    latency = [record for record in records if record["kind"] == "latency"]
    generation = [record for record in records if record["kind"] == "generation"]
    found = []
    if quantizer:
        device, batch = quantizer[0]["device"], quantizer[0]["batch"]
        work = f"float32, groups 32 + 8, batch {batch}, {device}"
        found += [
            Table(
                f"Quantizer, time: {work}",
                [_compared(record, "seconds", 1e-3, "ms") for record in quantizer],
                "Medians of time; in brackets, how many times ours: the median over rounds of the "
                "ratio within a round.",
            ),
            Table(
                f"Quantizer, memory: {work}",
                [_compared(record, "bytes", 2**20, "MiB") for record in quantizer],
                f"Peak of one call beyond the state before it: {MEMORY[device]}.",
            ),
            _bound(f"Quantizer, against the roofline: {work}", quantizer),
        ]
    if search:
        found.append(_search(search))
    if sampler:
        found.append(_sampler(sampler))
    if latency:
        found.append(_latency(latency))
    if generation:
        found.append(_generation(generation))
    if quantizer or search or sampler:
        found.append(_ceilings(quantizer + search + sampler, missing_ceilings, meanings))
    return found


def included(records: Sequence[Record]) -> list[str]:
    """What each implementation in the records does, a line each."""
    compared = [record for record in records if "results" in record]
    names = {(record["kind"], name): None for record in compared for name in record["results"]}
    texts = {
        **{("quantizer", name): item.includes for name, item in IMPLEMENTATIONS.items()},
        **{("search", name): item.includes for name, item in SEARCHES.items()},
        ("search", "ours"): "`nearest_code`, which normalises rows and codes too",
        **{("sampler", name): item.includes for name, item in SAMPLERS.items()},
        ("sampler", "ours"): "`sample_top_k_top_p`, without the errors of `check`",
    }
    return [f"{name} ({kind}): {texts[kind, name]}." for kind, name in names]


def _shape(record: Record) -> dict[str, str]:
    return {
        "pyramid": record["pyramid"],
        "K": str(record["codebook_size"]),
        "work": record["mode"],
    }


def multiple(record: Record, name: str, quantity: str) -> float:
    """How many times ours: of time the median of the rounds' ratios, of memory the ratio."""
    results = record["results"]
    if quantity == "seconds":
        return results[name]["ratio"]
    return results[name][quantity] / results["ours"][quantity]


def _compared(record: Record, quantity: str, unit: float, unit_name: str) -> dict[str, str]:
    """A row: ours, then each baseline as a value and a multiple of ours."""
    row, results = _shape(record), record["results"]
    for name, result in results.items():
        column = f"{name}, {unit_name}"
        if result.get("left_out"):
            row[column] = result["left_out"]
            continue
        value = result[quantity] / unit
        row[column] = f"{value:.2f}" if quantity == "seconds" else f"{value:.1f}"
        row[column] += "" if name == "ours" else f" ({multiple(record, name, quantity):.1f})"
    if quantity == "seconds":
        row["rounds"] = str(record["rounds"])
        differ = max(result.get("differ", 0) for result in results.values())
        row["tokens that differ"] = f"{differ} of {record['tokens']}"
    return row


def _bound(title: str, records: Sequence[Record]) -> Table:
    rates = {name: max(samples) for name, samples in ceiling_rates(records).items()}
    arithmetic = arithmetic_ceilings(rates)[0]
    rows = []
    for record in records:
        work, taken = Work(**record["work"]), record["results"]["ours"]["seconds"]
        least = least_seconds(work, rates[arithmetic], rates[COPY])
        limit = arithmetic if least == work.operations / rates[arithmetic] else COPY
        rows.append(
            {
                **_shape(record),
                "GFLOP": f"{work.operations / 1e9:.2f}",
                "MB": f"{work.bytes / 1e6:.2f}",
                "FLOP/byte": f"{work.intensity:.0f}",
                "limit": limit,
                "least ms": f"{least * 1e3:.2f}",
                "ours ms": f"{taken * 1e3:.2f}",
                "ours GFLOP/s": f"{work.operations / taken / 1e9:.1f}",
                **{f"of {limit}": f"{share:.0%}" for limit, share in record["fractions"].items()},
            }
        )
    note = (
        "GFLOP counts 2 N K 40 of every scale's search and nothing else; MB counts every input and "
        "output once. The least time is the larger of both at the ceilings below, at their best. "
        + _SHARES
    )
    return Table(title, rows, note)


_SHARES = (
    "A share is the least possible time at that ceiling over the time taken: the median over "
    "rounds, with the ceiling of the same round. Ours may score codes in int8 where the CPU "
    "multiplies it faster, and decide close ones in float64: it can then exceed 100% of "
    "float32's ceiling, and int8's is the one to look at."
)


def _search(records: Sequence[Record]) -> Table:
    rows = []
    shares = [f"of {name}" for name in arithmetic_ceilings(records[0]["ceilings"])]
    for record in records:
        for name, result in record["results"].items():
            row = {"N": str(record["rows"]), "K": str(record["codebook_size"]), "search": name}
            columns = ["ms", "GFLOP/s", "/ ours", *shares, "indices that differ"]
            if result.get("left_out"):
                rows.append({**row, **dict.fromkeys(columns, ""), "ms": result["left_out"]})
                continue
            rate = record["work"]["operations"] / result["seconds"]
            cells = [
                f"{result['seconds'] * 1e3:.2f}",
                f"{rate / 1e9:.1f}",
                f"{result['ratio']:.2f}",
                *(f"{share:.0%}" for share in result["fractions"].values()),
                str(result["differ"]),
            ]
            if name != "ours":  # the others multiply in float32
                cells[4:-1] = [""] * (len(shares) - 1)
            rows.append({**row, **dict(zip(columns, cells, strict=True))})
    return Table(
        f"Search alone: float32, width 40 = 32 + 8, {records[0]['device']}",
        rows,
        "GFLOP/s counts 2 N K 40 for every search, whatever it really does. " + _SHARES,
    )


def _sampler(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        for name, result in record["results"].items():
            row = {
                "rows": str(record["rows"]),
                "logits": record["dtype"],
                "k": str(record["top_k"]),
                "p": str(record["top_p"]),
                "sampler": name,
            }
            columns = ["ms", "/ ours", "GB/s", f"of {COPY}"]
            if result.get("left_out"):
                rows.append({**row, **dict.fromkeys(columns, ""), "ms": result["left_out"]})
                continue
            cells = [
                f"{result['seconds'] * 1e3:.2f}",
                f"{result['ratio']:.1f}",
                f"{record['bytes'] / result['seconds'] / 1e9:.2f}",
                f"{result['of_copy']:.0%}",
            ]
            rows.append({**row, **dict(zip(columns, cells, strict=True))})
    return Table(
        f"Sampler: {records[0]['codes']:,} codes, guidance, {records[0]['device']}",
        rows,
        "GB/s counts both inputs once for every sampler, whatever it really moves; its share is of "
        "the copy's rate in the same round, which counts what is read and what is written.",
    )


def _latency(records: Sequence[Record]) -> Table:
    rows = [
        {
            "pyramid": record["pyramid"],
            "K": str(record["codebook_size"]),
            "graph, ms": f"{record['graph'] * 1e3:.3f}",
            "launched, ms": f"{record['launched'] * 1e3:.3f}",
            "rounds": str(record["rounds"]),
        }
        for record in records
    ]
    return Table(
        f"Latency of a forward pass: float32, groups 32 + 8, batch 1, {records[0]['device']}",
        rows,
        "Medians, each with the wait for the device at its end. `graph` replays the captured call.",
    )


def _generation(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        seconds, positions = record["seconds"], record["positions"]
        rows.append(
            {
                "model": record["shape"],
                "positions": f"{positions['ours']:,}",
                "cacheless": f"{positions['cacheless']:,}",
                "s an image": f"{seconds['ours'] / record['batch']:.3f}",
                "cacheless, s": f"{seconds['cacheless'] / record['batch']:.3f}",
                "ours / cacheless": f"{1 / record['ratio']:.3f}",
                "rounds": str(record["rounds"]),
                "tokens that differ": f"{record['differ']} of {record['tokens']}",
            }
        )
    first = records[0]
    return Table(
        f"Text to image: {first['dtype']}, batch {first['batch']}, {first['device']}",
        rows,
        "Three-step sampling with guidance, 9 scales, 817 tokens, prompts of 61 places. "
        "`cacheless` is the algorithm as the method describes it, on the same layers: each of the "
        "25 runs computes the sequence from its start. Positions are those of one sequence; each "
        "image has two. The ratio is the median over rounds of the ratio within a round.",
    )


def _ceilings(
    records: Sequence[Record], missing: dict[str, str], meanings: dict[str, str]
) -> Table:
    rows = []
    for name, samples in ceiling_rates(records).items():
        unit = {COPY: "GB/s", BYTE_PRODUCT: "Gop/s"}.get(name, "GFLOP/s")
        rows.append(
            {
                "ceiling": name,
                "measured by": meanings[name],
                "median": f"{statistics.median(samples) / 1e9:.1f} {unit}",
                "best": f"{max(samples) / 1e9:.1f} {unit}",
                "samples": str(len(samples)),
            }
        )
    for name, reason in missing.items():
        rows.append(
            {
                "ceiling": name,
                "measured by": reason,
                "median": "not measured",
                "best": "",
                "samples": "0",
            }
        )
    return Table(
        "Ceilings of the machine",
        rows,
        "Sampled in every round of the run, with all threads unless it says otherwise.",
    )
