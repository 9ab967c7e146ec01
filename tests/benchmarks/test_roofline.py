"""Counted work, shares of the bound, and the native measurement of the arithmetic's ceiling."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest

from benchmarks.cases import Case
from benchmarks.roofline import (
    BYTE_PRODUCT,
    COPY,
    MATRIX_PRODUCT,
    MULTIPLY_ADD,
    Native,
    Work,
    arithmetic_ceilings,
    fractions_of_bounds,
    quantizer_work,
    search_work,
)


def test_search_work() -> None:
    # 10 rows and 100 codes of 40 float32 are read, 10 int64 are written.
    assert search_work(10, 100) == Work(2 * 10 * 100 * 40, 160 * 110 + 80)


def test_quantizer_work() -> None:
    # "tiny": sides 1 and 2, 5 tokens an image; a plane has 3 * 40 * 4 float32.
    forward = quantizer_work(Case("tiny", 64, "forward", batch=3))
    assert forward == Work(2 * 15 * 64 * 40, 2 * 1920 + 64 * 160 + 8 * 15 + 8 * 64)
    both = quantizer_work(Case("tiny", 64, "forward+backward", batch=3))
    assert both.operations == forward.operations
    assert both.bytes == forward.bytes + 3 * 1920 + 2 * 64 * 160 + 8 * 15


class TestFractions:
    def test_takes_rounds_together(self) -> None:
        rates = {MULTIPLY_ADD: [10.0, 5.0, 10.0], COPY: [1e9] * 3}
        # 100 operations need 10, 20 and 10 s at least.
        assert fractions_of_bounds(Work(100, 1), [20, 40, 40], rates) == {MULTIPLY_ADD: 0.5}

    def test_memory_can_be_the_bound(self) -> None:
        rates = {MATRIX_PRODUCT: [1e9], COPY: [10.0]}
        assert fractions_of_bounds(Work(1, 100), [20], rates) == {MATRIX_PRODUCT: 0.5}

    def test_ceilings(self) -> None:
        assert arithmetic_ceilings([COPY, MATRIX_PRODUCT]) == [MATRIX_PRODUCT]
        everything = [COPY, MATRIX_PRODUCT, MULTIPLY_ADD, BYTE_PRODUCT]
        assert arithmetic_ceilings(everything) == [MULTIPLY_ADD, BYTE_PRODUCT]


class TestNative:
    @pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
    def test_measures_independent_chains(self, tmp_path) -> None:
        native = Native(tmp_path)
        assert native.library is not None, native.reason
        assert native.sample("float_multiply_add_rate", 1)() > 1e8
        if platform.machine() == "x86_64" and shutil.which("objdump"):
            code = subprocess.run(
                ["objdump", "-d", str(tmp_path / "peak.so")],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            # Folded into one chain, the loop would measure latency and report twelve times that.
            assert code.count("vfmadd") >= 12 or code.count("mulps") >= 12

    def test_says_why_not(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        native = Native(tmp_path)
        assert native.library is None
        assert native.reason == "no C++ compiler"
