"""The built library: what it is linked with, what it says of itself, what is said without it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_build import find_compiler

import tokenflow_ext
from tokenflow_ext import _build


def undefined_symbols(library: Path) -> list[str]:
    output = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [line.split(maxsplit=1)[1] for line in output.splitlines()]


def needed(library: Path) -> list[str]:
    output = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd="/",
        check=False,
    )


class TestStableAbi:
    """The library depends on the C shim of torch alone, so that any torch from 2.10 on loads it."""

    def test_uses_torch(self) -> None:
        # Guards the tests below: they would pass on a library without operators too.
        assert any(name.startswith("aoti_torch_") for name in undefined_symbols(_build.LIBRARY))

    def test_no_cxx_symbol_of_torch(self) -> None:
        tied = [
            name
            for name in undefined_symbols(_build.LIBRARY)
            if re.search(r"\b(c10|at|torch|caffe2)::", name)
        ]
        assert tied == []

    def test_no_python_symbol(self) -> None:
        names = undefined_symbols(_build.LIBRARY)
        assert [name for name in names if re.match(r"_?Py[A-Z_]", name)] == []

    def test_needs_no_library_of_one_version(self) -> None:
        libraries = needed(_build.LIBRARY)
        assert "libtorch_cpu.so" in libraries
        refused = re.compile(r"libc10|libtorch_python|libpython|libcudart")
        assert [name for name in libraries if refused.match(name)] == []

    def test_kernels_stay_inside(self) -> None:
        output = subprocess.run(
            ["nm", "-D", "-C", "--defined-only", str(_build.LIBRARY)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert [line for line in output.splitlines() if "tokenflow::" in line] == []


class TestBuildInfo:
    def test_facts(self) -> None:
        import tokenflow_ext

        info = tokenflow_ext.build_info()
        assert info["version"] == importlib.metadata.version("tokenflow_ext")
        major, minor = map(int, info["torch"].split(".")[:2])
        assert (major, minor) >= (2, 10)
        assert info["torch_running"] == torch.__version__
        assert info["cpu_instruction_set"] in (
            "portable",
            "avx2",
            "avx512",
            "avx512_vnni",
            "amx",
            "dotprod",
        )
        assert re.match(r"(gcc|clang) \d+", info["compiler"])
        assert Path(info["library"]).is_file()
        if info["cuda"] is None:
            assert info["cuda_architectures"] == []
        else:
            assert re.fullmatch(r"\d+\.\d+", info["cuda"])
            assert info["cuda_architectures"]
        assert info["cuda_reason"]

    def test_instruction_set_is_the_one_asked_for(self) -> None:
        code = "import tokenflow_ext; print(tokenflow_ext.build_info()['cpu_instruction_set'])"
        result = run_python(code, TOKENFLOW_CPU="portable")
        assert result.stdout.strip() == "portable", result.stderr

    def test_an_instruction_set_that_is_not_there_is_refused(self) -> None:
        code = "import tokenflow_ext; tokenflow_ext.build_info()"
        result = run_python(code, TOKENFLOW_CPU="garbage")
        assert result.returncode != 0
        last = result.stderr.strip().splitlines()[-1]
        assert "InstructionSetError: TOKENFLOW_CPU must be one of" in last
        assert "portable" in last
        assert last.endswith("got garbage")

    def test_a_python_that_the_facts_were_not_built_for(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "tokenflow_ext._build_info", None)
        for name in ("310-x", "39-x", "314t-x", "313-y"):
            (tmp_path / f"_build_info.cpython-{name}.so").touch()
        monkeypatch.setattr(_build, "LIBRARY", tmp_path / "libtokenflow_ops.so")
        with pytest.raises(_build.KernelsMissingError, match="no build facts"):
            _build.build_info()
        _build.LIBRARY.touch()
        with pytest.raises(
            _build.BuildFactsMissingError, match=re.escape("3.9, 3.10, 3.13, 3.14t)")
        ):
            _build.build_info()

    def test_the_version_is_the_metadatas(self) -> None:
        assert tokenflow_ext.__version__ == importlib.metadata.version("tokenflow_ext")
        with pytest.raises(AttributeError, match="no attribute '__author__'"):
            tokenflow_ext.__author__  # noqa: B018

    def test_import_needs_torch_alone(self) -> None:
        # Some of these come with `import torch` where they are installed.
        code = (
            "import sys, torch; before = set(sys.modules); import tokenflow_ext; "
            "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
        )
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        imported = set(result.stdout.split())
        assert "tokenflow_ext" in imported
        extras = {"open_clip", "timm", "transformers", "lpips", "safetensors", "torchvision"}
        extras |= {"yaml", "tqdm", "tensorboard", "PIL", "matplotlib", "skimage", "sklearn"}
        assert extras & imported == set()


class TestWithoutLibrary:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(_build, "LIBRARY", tmp_path / "libtokenflow_ops.so")
        with pytest.raises(_build.KernelsMissingError, match=r"not found at .*`pip install \.`"):
            _build.load_library()

    def test_not_a_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "libtokenflow_ops.so"
        broken.write_bytes(b"\x7fELF, and no more")
        monkeypatch.setattr(_build, "LIBRARY", broken)
        with pytest.raises(
            _build.KernelsMissingError, match=r"cannot be loaded: .*(file|header).*`pip install \.`"
        ):
            _build.load_library()

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has libtorch_cuda.so")
    def test_cuda_library_beside_a_torch_without(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        # A library that needs libtorch_cuda.so (an empty one, gone again before the load).
        source, needed_library = tmp_path / "empty.cpp", tmp_path / "libtorch_cuda.so"
        source.touch()
        library = tmp_path / "libtokenflow_ops.so"
        compiler = [find_compiler(os.environ), "-shared", "-fPIC", str(source)]
        subprocess.run([*compiler, "-o", str(needed_library)], check=True)
        link = ["-Wl,--no-as-needed", f"-L{tmp_path}", "-ltorch_cuda"]
        subprocess.run([*compiler, *link, "-o", str(library)], check=True)
        needed_library.unlink()
        monkeypatch.setattr(_build, "LIBRARY", library)
        with pytest.raises(
            _build.KernelsMissingError,
            match=r"libtorch_cuda\.so: cannot open.*build them again beside this torch",
        ):
            _build.load_library()

    def test_old_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "__version__", "2.9.1")
        with pytest.raises(_build.KernelsMissingError, match=r"2\.9\.1 is too old.*Fix:"):
            _build.load_library()

    def test_loading_twice_is_harmless(self) -> None:
        _build.load_library()
        _build.load_library()
