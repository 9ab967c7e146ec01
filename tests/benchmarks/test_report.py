"""The report: what is in a results file is what is in the tables and plots."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks import machine, report
from benchmarks.cases import Case
from benchmarks.roofline import BYTE_PRODUCT, COPY, MATRIX_PRODUCT, MULTIPLY_ADD
from benchmarks.tables import tables

RATES = {
    COPY: [10e9, 20e9],
    MATRIX_PRODUCT: [90e9, 80e9],
    MULTIPLY_ADD: [100e9, 200e9],
    BYTE_PRODUCT: [400e9, 800e9],
}


def result(seconds: float, ratio: float, mib: float) -> dict:
    return {"differ": 1, "seconds": seconds, "ratio": ratio, "bytes": mib * 2**20}


@pytest.fixture
def records() -> list[dict]:
    case = Case("XL", 131072, "forward", 2)
    quantizer = {
        "kind": "quantizer",
        **asdict(case),
        "tokens": 4454,
        "rounds": 2,
        "work": {"operations": 2 * 10**9, "bytes": 10**6},
        "scores": 10**8,
        "fractions": {MULTIPLY_ADD: 0.5, BYTE_PRODUCT: 0.125},
        "results": {
            "ours": result(0.020, 1, 10),
            "released": {"left_out": "needs 90 of 20 GiB free"},
            "eager": result(0.110, 5.4, 35),
        },
        "ceilings": RATES,
    }
    search = {
        "kind": "search",
        "device": "cpu",
        "batch": 2,
        "rows": 1458,
        "codebook_size": 8192,
        "rounds": 2,
        "work": {"operations": 10**9, "bytes": 10**6},
        "results": {
            name: {**result(seconds, 1, 0), "fractions": {MULTIPLY_ADD: 1.5, BYTE_PRODUCT: 0.4}}
            for name, seconds in [("ours", 0.005), ("product + argmax", 0.020)]
        },
        "ceilings": RATES,
    }
    latency = {
        "kind": "latency",
        "device": "cpu",
        "pyramid": "B",
        "codebook_size": 32768,
        "rounds": 30,
        "graph": 0.00025,
        "launched": 0.0015,
    }
    generation = {
        "kind": "generation",
        "device": "cpu",
        "shape": "tiny",
        "batch": 2,
        "dtype": "float32",
        "positions": {"ours": 2509, "cacheless": 8005},
        "seconds": {"ours": 1.0, "cacheless": 4.0},
        "ratio": 3.9,
        "differ": 3,
        "tokens": 1634,
        "rounds": 3,
    }
    return [quantizer, search, latency, generation]


def row(table, **cells: str) -> dict[str, str]:
    [found] = [r for r in table.rows if all(r[key] == value for key, value in cells.items())]
    return found


def test_tables(records) -> None:
    time, memory, bound, search, latency, generation, ceilings = tables(
        records, {"int4": "no such instruction"}, dict.fromkeys(RATES, "how")
    )
    [cells] = time.rows
    assert cells["ours, ms"] == "20.00"
    assert cells["eager, ms"] == "110.00 (5.4)"
    assert cells["released, ms"] == "needs 90 of 20 GiB free"
    assert cells["tokens that differ"] == "1 of 4454"
    assert memory.rows[0]["eager, MiB"] == "35.0 (3.5)"
    # 2 GFLOP at the best 200 GFLOP/s.
    assert bound.rows[0]["least ms"] == "10.00"
    assert bound.rows[0]["limit"] == MULTIPLY_ADD
    assert bound.rows[0]["ours GFLOP/s"] == "100.0"
    assert bound.rows[0][f"of {MULTIPLY_ADD}"] == "50%"
    ours = row(search, search="ours")
    assert (ours["GFLOP/s"], ours[f"of {BYTE_PRODUCT}"]) == ("200.0", "40%")
    assert row(search, search="product + argmax")[f"of {BYTE_PRODUCT}"] == ""
    assert (latency.rows[0]["graph, ms"], latency.rows[0]["launched, ms"]) == ("0.250", "1.500")
    [cells] = generation.rows
    assert (cells["s an image"], cells["cacheless, s"]) == ("0.500", "2.000")
    assert (cells["ours / cacheless"], cells["positions"]) == ("0.256", "2,509")
    copy = row(ceilings, ceiling=COPY)
    assert (copy["median"], copy["best"], copy["samples"]) == ("15.0 GB/s", "20.0 GB/s", "4")
    assert row(ceilings, ceiling="int4")["median"] == "not measured"


def test_columns_line_up(records) -> None:
    for table in tables(records, {}, dict.fromkeys(RATES, "how")):
        assert len(set(map(len, table.lines()))) == 1


@pytest.fixture
def results_file(records, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    run = {
        **machine.facts(["benchmarks", "-k", "a or b"]),
        "load after": [1.0, 1.0, 1.0],
        "ceilings": {"cpu": dict.fromkeys(RATES, "how")},
        "missing ceilings": {"cpu": {}},
    }
    run["device"]["cpu"] = "Some CPU (R) 3000"
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps({"benchmarks": [{"extra_info": record} for record in records], "run": run})
    )
    return path


def test_writes_a_folder(results_file, tmp_path) -> None:
    report.main(["--json", str(results_file), "--out", str(tmp_path / "out")])
    folder = tmp_path / "out" / "some-cpu-r-3000"
    text = (folder / "report.md").read_text()
    assert "# Benchmarks on Some CPU (R) 3000" in text
    assert "MALLOC_MMAP_MAX_=0" in text
    assert "pytest benchmarks -k 'a or b'`" in text
    for name in ("time", "memory", "search", "roofline"):
        assert f"![{name}]({name}.svg)" in text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()


def test_same_results_same_files(results_file, tmp_path) -> None:
    for out in ("a", "b"):
        report.main(["--json", str(results_file), "--out", str(tmp_path / out)])
    for first in sorted((tmp_path / "a").rglob("*.*")):
        second = tmp_path / "b" / first.relative_to(tmp_path / "a")
        assert first.read_bytes() == second.read_bytes(), first.name


def test_only_the_device_asked_for(results_file, tmp_path) -> None:
    report.main(["--json", str(results_file), "--out", str(tmp_path / "o"), "--devices", "cuda"])
    assert not (tmp_path / "o").exists()
