"""What the build decides, as functions of plain values: no compiler, toolkit or GPU is needed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import backend
import kernel_build
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_build import BuildError, CudaToolkit

TOOLKIT = CudaToolkit("/opt/cuda/bin/nvcc", (12, 8), Path("/opt/cuda"))


def kept(text: str | None) -> list[str]:
    return [str(architecture) for architecture in kernel_build.parse_architectures(text)[0]]


class TestArchitectures:
    @pytest.mark.parametrize("text", [None, "", "  "])
    def test_default(self, text: str | None) -> None:
        assert kept(text) == ["8.0", "9.0+PTX"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("8.6", ["8.6"]),
            ("8.0;8.6;9.0+PTX", ["8.0", "8.6", "9.0+PTX"]),
            ("8.0 9.0a", ["8.0", "9.0a"]),
            ("8.0, 8.0;12.0", ["8.0", "12.0"]),
            ("Hopper", ["9.0+PTX"]),
            ("ampere;9.0", ["8.0", "8.6+PTX", "9.0"]),
        ],
    )
    def test_reads_torchs_forms(self, text: str, expected: list[str]) -> None:
        assert kept(text) == expected

    def test_old_entries_are_dropped_and_reported(self) -> None:
        architectures, dropped = kernel_build.parse_architectures("5.2 6.1 7.0 8.0 9.0+PTX")
        assert list(map(str, architectures)) == ["8.0", "9.0+PTX"]
        assert list(map(str, dropped)) == ["5.2", "6.1", "7.0"]

    @pytest.mark.parametrize("text", ["sm_80", "8", "9.0+ptx+", "Volta", "8.0;all"])
    def test_unreadable_entry_is_named(self, text: str) -> None:
        with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST: cannot read"):
            kernel_build.parse_architectures(text)

    def test_nothing_recent_enough(self) -> None:
        with pytest.raises(BuildError, match=r"no architecture of 8\.0 or later.*Fix:"):
            kernel_build.parse_architectures("6.0;7.5+PTX")

    def test_nvcc_flags(self) -> None:
        [plain, ptx] = kernel_build.parse_architectures("8.0;9.0a+PTX")[0]
        assert plain.flags() == ["-gencode=arch=compute_80,code=sm_80"]
        assert ptx.flags() == [
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_90a,code=compute_90a",
        ]


class TestCuda:
    def test_built_where_torch_and_nvcc_allow(self) -> None:
        decision = kernel_build.decide_cuda(None, "2.13.0+cu130", "13.0", TOOLKIT)
        assert decision.build
        assert "13.0" in decision.reason
        assert "12.8" in decision.reason

    @pytest.mark.parametrize(
        ("torch_cuda", "toolkit", "reason"),
        [
            (None, TOOLKIT, "without CUDA"),
            ("13.0", None, "no nvcc was found"),
            ("13.0", CudaToolkit("nvcc", (11, 8), Path("/")), r"11\.8 .*older than 12\.0"),
        ],
    )
    def test_what_stands_in_the_way_is_said(
        self, torch_cuda: str | None, toolkit: CudaToolkit | None, reason: str
    ) -> None:
        decision = kernel_build.decide_cuda(None, "2.13.0", torch_cuda, toolkit)
        assert not decision.build
        with pytest.raises(BuildError, match=reason) as caught:
            kernel_build.decide_cuda("1", "2.13.0", torch_cuda, toolkit)
        assert decision.reason in str(caught.value)

    def test_switched_off(self) -> None:
        decision = kernel_build.decide_cuda("0", "2.13.0", "13.0", TOOLKIT)
        assert not decision.build
        assert "TOKENFLOW_CUDA=0" in decision.reason

    def test_empty_setting_is_no_setting(self) -> None:
        assert kernel_build.decide_cuda("", "2.13.0", "13.0", TOOLKIT).build

    @pytest.mark.parametrize("setting", ["yes", "2", "on"])
    def test_other_settings_are_refused(self, setting: str) -> None:
        with pytest.raises(BuildError, match=f"0 or 1, got '{setting}'"):
            kernel_build.decide_cuda(setting, "2.13.0", "13.0", TOOLKIT)


class TestJobs:
    @pytest.mark.parametrize(
        ("cores", "gigabytes", "setting", "sources", "expected"),
        [
            (8, 64, None, 100, 8),
            (8, 5, None, 100, 2),
            (8, 0, None, 100, 1),
            (8, 64, None, 3, 3),
            (8, None, None, 100, 8),
            (2, 64, "6", 100, 6),
            (8, 1, "4", 2, 2),
        ],
    )
    def test_limit(
        self,
        cores: int,
        gigabytes: int | None,
        setting: str | None,
        sources: int,
        expected: int,
    ) -> None:
        memory = None if gigabytes is None else gigabytes << 30
        assert kernel_build.job_limit(cores, memory, setting, sources) == expected

    @given(st.integers(1, 512), st.none() | st.integers(0, 1 << 45), st.integers(1, 1000))
    def test_at_least_one_and_within_every_limit(
        self, cores: int, memory: int | None, sources: int
    ) -> None:
        jobs = kernel_build.job_limit(cores, memory, None, sources)
        assert 1 <= jobs <= min(cores, sources)
        if memory is not None and jobs > 1:
            assert jobs * kernel_build.MEMORY_PER_JOB <= memory

    @pytest.mark.parametrize("setting", ["0", "-1", "many"])
    def test_bad_setting_is_refused(self, setting: str) -> None:
        with pytest.raises(BuildError, match="MAX_JOBS must be a positive number"):
            kernel_build.job_limit(2, None, setting)

    def test_memory_of_this_machine(self) -> None:
        memory = kernel_build.available_memory()
        assert memory is not None
        assert 0 < memory < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class TestInstructionSets:
    def test_by_name_on_x86(self) -> None:
        assert kernel_build.instruction_set_flags("kernels_avx2.cpp", "x86_64") == [
            "-mavx2",
            "-mfma",
        ]
        avx512 = kernel_build.instruction_set_flags("a_avx512.cpp", "x86_64")
        assert "-mavx512vl" in avx512
        assert "-mavx512vnni" not in avx512
        assert "-mavx512vnni" in kernel_build.instruction_set_flags("a_avx512vnni.cpp", "x86_64")
        assert kernel_build.instruction_set_flags("avx2_notes.cpp", "x86_64") == []

    def test_nothing_elsewhere(self) -> None:
        assert kernel_build.instruction_set_flags("kernels_avx2.cpp", "aarch64") == []


class TestTorch:
    @pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.15.0a0+git", "3.0.0"])
    def test_recent_enough(self, version: str) -> None:
        kernel_build.check_torch(version)

    @pytest.mark.parametrize("version", ["2.9.1", "1.13.1+cu117"])
    def test_too_old(self, version: str) -> None:
        with pytest.raises(BuildError, match=r"too old.*Fix: pip install --upgrade 'torch>=2\.10'"):
            kernel_build.check_torch(version)

    @pytest.mark.parametrize(
        ("installed", "expected"),
        [(None, ["torch>=2.10"]), ("2.9.1", ["torch>=2.10"]), ("2.13.0+cpu", []), ("2.10.0", [])],
    )
    def test_asked_for_only_where_missing(
        self, tmp_path: Path, installed: str | None, expected: list[str]
    ) -> None:
        if installed is not None:
            folder = tmp_path / f"torch-{installed}.dist-info"
            folder.mkdir()
            folder.joinpath("METADATA").write_text(
                f"Metadata-Version: 2.1\nName: torch\nVersion: {installed}\n"
            )
        assert backend.torch_requirement([str(tmp_path)]) == expected

    def test_this_environments_torch_is_found(self) -> None:
        import torch

        # The metadata of some builds leaves out what follows the "+" (+cu130).
        found = backend.find_torch(backend.environment_paths())
        assert found in (torch.__version__, torch.__version__.partition("+")[0])


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class TestThisMachine:
    def test_compiler_is_cxx_where_set(self, tmp_path: Path) -> None:
        compiler = executable(tmp_path / "mine", "#!/bin/sh\n")
        assert kernel_build.find_compiler({"CXX": f"{compiler} -m64"}) == [str(compiler), "-m64"]

    def test_no_compiler(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"no C\+\+ compiler was found.*Fix: install one"):
            kernel_build.find_compiler({"PATH": str(tmp_path)})
        with pytest.raises(BuildError, match="CXX='missing' is not a program"):
            kernel_build.find_compiler({"PATH": str(tmp_path), "CXX": "missing"})

    def test_toolkit_behind_a_wrapper(self, tmp_path: Path) -> None:
        """CUDA_HOME decides; nvcc itself says where its toolkit is."""
        home = tmp_path / "toolkit"
        (home / "include").mkdir(parents=True)
        (home / "include" / "cuda_runtime_api.h").touch()
        (home / "lib").mkdir()
        (home / "lib" / "libcudart_static.a").touch()
        nvcc = executable(
            tmp_path / "wrapper" / "bin" / "nvcc",
            "#!/bin/sh\n"
            'case "$1" in\n'
            "  --version) echo 'Cuda compilation tools, release 12.8, V12.8.93' ;;\n"
            f"  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;\n"
            "esac\n",
        )
        (home / "bin").mkdir()
        environment = {"CUDA_HOME": str(tmp_path / "wrapper"), "PATH": "/usr/bin:/bin"}
        toolkit = kernel_build.find_toolkit(environment)
        assert toolkit == CudaToolkit(str(nvcc), (12, 8), home)
        assert toolkit.include_dirs() == [home / "include"]
        assert toolkit.static_runtime() == home / "lib" / "libcudart_static.a"
