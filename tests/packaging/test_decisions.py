"""What the build decides, as functions of plain values: no compiler, toolkit or GPU is needed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import subprocess
from pathlib import Path

import backend
import kernel_build
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_build import BuildError

ROOT = Path(__file__).resolve().parents[2]


def kept(text: str | None) -> list[str]:
    return kernel_build.parse_architectures(text)[0]


class TestArchitectures:
    @pytest.mark.parametrize("text", [None, "", "  "])
    def test_default(self, text: str | None) -> None:
        assert kept(text) == ["8.0+PTX", "9.0a"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("8.6", ["8.6"]),
            ("8.0;8.6;9.0+PTX", ["8.0", "8.6", "9.0+PTX"]),
            ("8.0 9.0a", ["8.0", "9.0a"]),
            ("8.0, 12.0;", ["8.0", "12.0"]),
            ("Hopper", ["Hopper"]),
            ("Ampere;10.0", ["Ampere", "10.0"]),
        ],
    )
    def test_reads_torchs_forms(self, text: str, expected: list[str]) -> None:
        assert kept(text) == expected

    def test_old_entries_are_dropped_and_reported(self) -> None:
        kept, dropped = kernel_build.parse_architectures("5.2 6.1 7.0+PTX Volta 8.0 9.0+PTX")
        assert kept == ["8.0", "9.0+PTX"]
        assert dropped == ["5.2", "6.1", "7.0+PTX", "Volta"]

    @pytest.mark.parametrize("text", ["6.0;7.5+PTX", "Turing", "Kepler+Tesla"])
    def test_nothing_recent_enough(self, text: str) -> None:
        with pytest.raises(BuildError, match=r"the kernels need 8\.0 or later.*Fix:"):
            kernel_build.parse_architectures(text)


class TestCuda:
    def test_built_where_torch_and_nvcc_allow(self) -> None:
        build, reason = kernel_build.decide_cuda(None, "12.6", "12.8")
        assert build
        assert "12.6" in reason
        assert "12.8" in reason
        assert "WARNING" not in reason

    @pytest.mark.parametrize(
        ("torch_cuda", "nvcc", "warned"),
        [("12.8", "13.0", True), ("13.0", "13.1", False), ("13.0", "12.8", False)],
    )
    def test_warns_where_nvcc_is_a_major_version_ahead(
        self, torch_cuda: str, nvcc: str, warned: bool
    ) -> None:
        build, reason = kernel_build.decide_cuda("1", torch_cuda, nvcc)
        assert build
        assert ("WARNING: nvcc is a major version ahead" in reason) == warned

    @pytest.mark.parametrize(
        ("torch_cuda", "nvcc", "reason"),
        [
            (None, "12.8", "without CUDA"),
            ("13.0", None, "no nvcc was found"),
            ("13.0", "11.8", r"nvcc 11\.8 is older than 12\.0"),
        ],
    )
    def test_what_stands_in_the_way_is_said(
        self, torch_cuda: str | None, nvcc: str | None, reason: str
    ) -> None:
        build, said = kernel_build.decide_cuda(None, torch_cuda, nvcc)
        assert not build
        with pytest.raises(BuildError, match=reason) as caught:
            kernel_build.decide_cuda("1", torch_cuda, nvcc)
        assert said in str(caught.value)

    def test_switched_off(self) -> None:
        assert kernel_build.decide_cuda("0", "13.0", "13.0") == (False, "TOKENFLOW_CUDA=0")

    def test_empty_setting_is_no_setting(self) -> None:
        assert kernel_build.decide_cuda("", "13.0", "13.0")[0]

    @pytest.mark.parametrize("setting", ["yes", "2", "on"])
    def test_other_settings_are_refused(self, setting: str) -> None:
        with pytest.raises(BuildError, match=f"0 or 1, got '{setting}'"):
            kernel_build.decide_cuda(setting, "13.0", "13.0")


class TestJobs:
    @pytest.mark.parametrize(
        ("cores", "gigabytes", "setting", "expected"),
        [(8, 64, None, 8), (8, 5, None, 2), (8, 0, None, 1), (2, 64, "6", 6), (8, 1, "4", 4)],
    )
    def test_limit(self, cores: int, gigabytes: int, setting: str | None, expected: int) -> None:
        assert kernel_build.job_limit(cores, gigabytes << 30, setting) == expected

    @given(st.integers(1, 512), st.integers(0, 1 << 45))
    def test_at_least_one_and_within_every_limit(self, cores: int, memory: int) -> None:
        jobs = kernel_build.job_limit(cores, memory)
        assert 1 <= jobs <= cores
        assert jobs == 1 or jobs * kernel_build.MEMORY_PER_JOB <= memory

    @pytest.mark.parametrize("setting", ["0", "-1", "many", "00"])
    def test_bad_setting_is_refused(self, setting: str) -> None:
        with pytest.raises(BuildError, match="MAX_JOBS must be a positive number"):
            kernel_build.job_limit(2, 1 << 40, setting)

    def test_memory_of_this_machine(self) -> None:
        memory = kernel_build.available_memory()
        assert 0 < memory < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class TestFlags:
    def test_reads_names_and_leaves_comments(self, tmp_path: Path) -> None:
        path = tmp_path / "flags.txt"
        path.write_text("# cxx: -O0\n\ncxx: -O3 -Wall\nnvcc: -Xcompiler -fPIC,-Wall\n")
        expected = {"cxx": ["-O3", "-Wall"], "nvcc": ["-Xcompiler", "-fPIC,-Wall"]}
        assert kernel_build.read_flags(path) == expected

    def test_instruction_sets_are_those_the_compiler_knows(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cxx = kernel_build.find_compiler(os.environ)
        flags = {"cxx": ["-O3"], "nvcc": ["--none"], "plain": ["-O1"], "newer": ["-mno-such-set"]}
        assert kernel_build.instruction_sets(cxx, flags, "x86_64") == ["plain"]
        said = capsys.readouterr().out.splitlines()
        assert said == [f"{cxx} does not know newer: the kernels for it are left out"]
        assert kernel_build.instruction_sets(cxx, flags, "aarch64") == []

    @pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
    def test_cmake_reads_the_same(self, tmp_path: Path) -> None:
        flags = kernel_build.read_flags(ROOT / "csrc" / "flags.txt")
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True)
        commands = {
            Path(entry["file"]).name: entry["command"].split()
            for entry in json.loads((tmp_path / "compile_commands.json").read_text())
        }
        cxx = kernel_build.find_compiler(os.environ)
        here = kernel_build.instruction_sets(cxx, flags, platform.machine())
        for name in (path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")):
            suffix = name[:-4].rpartition("_")[2]
            instruction_set = flags[suffix] if suffix in here else []
            found = commands[name]
            assert {*flags["cxx"], *instruction_set} <= {*found}
            machine = {flag for flag in instruction_set if flag.startswith("-m")}
            assert {flag for flag in found if flag.startswith("-m")} == machine


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
        found = backend.requirements([str(tmp_path)])
        assert [name for name in found if name.startswith("torch")] == expected

    def test_ninja_is_asked_for_only_where_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "ninja" in backend.requirements([])
        executable(tmp_path / "ninja", "#!/bin/sh\n")
        assert "ninja" not in backend.requirements([])

    def test_this_environments_torch_is_found(self) -> None:
        assert "torch>=2.10" not in backend.requirements(backend.environment_paths())


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class TestThisMachine:
    def test_compiler_is_cxx_where_set(self, tmp_path: Path) -> None:
        compiler = str(executable(tmp_path / "mine", "#!/bin/sh\n"))
        assert kernel_build.find_compiler({"CXX": compiler, "PATH": "/usr/bin"}) == compiler

    def test_no_compiler(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"^no C\+\+20 compiler was found\. Fix: "):
            kernel_build.find_compiler({"PATH": str(tmp_path)})
        with pytest.raises(BuildError, match=r"compiler in CXX='missing' was found"):
            kernel_build.find_compiler({"PATH": str(tmp_path), "CXX": "missing"})

    def test_a_compiler_without_this_standard_is_passed_over(self, tmp_path: Path) -> None:
        executable(tmp_path / "c++", "#!/bin/sh\nexit 1\n")
        executable(tmp_path / "clang++", "#!/bin/sh\n")
        assert kernel_build.find_compiler({"PATH": str(tmp_path)}) == "clang++"

    @pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "PATH"])
    def test_toolkit_behind_a_wrapper(self, tmp_path: Path, name: str) -> None:
        """The environment decides which nvcc; nvcc itself says where its toolkit is."""
        home = tmp_path / "toolkit"
        (home / "bin").mkdir(parents=True)
        executable(
            tmp_path / "wrapper" / "bin" / "nvcc",
            "#!/bin/sh\n"
            'case "$1" in\n'
            "  --version) echo 'Cuda compilation tools, release 12.8, V12.8.93' ;;\n"
            f"  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;\n"
            "esac\n",
        )
        place = tmp_path / "wrapper" / ("bin" if name == "PATH" else "")
        environment = {"PATH": "/usr/bin:/bin", name: str(place)}
        assert kernel_build.find_toolkit(environment) == (str(home), "12.8")

    def test_an_nvcc_that_does_not_answer_is_none(self, tmp_path: Path) -> None:
        executable(tmp_path / "bin" / "nvcc", "#!/bin/sh\nexit 1\n")
        assert kernel_build.find_toolkit({"CUDA_HOME": str(tmp_path)}) == (None, None)
