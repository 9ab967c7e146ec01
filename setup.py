"""Builds the kernels with torch's own tool; the rest about the package is in pyproject.toml."""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
from pathlib import Path
from sysconfig import get_platform
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import kernel_build  # noqa: E402

# tokenflow_ext.models and tokenflow_ext.train lie beside the library, one folder each, and links
# lead to them: nothing called "models" or "train" gets into an environment.
LINKS = ("tokenflow_ext/models", "tokenflow_ext/train")


class SourceDistribution(sdist):
    """Keeps the links that put models/ and train/ inside the package, in the place of copies."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for link in LINKS:
            os.symlink(os.readlink(ROOT / link), os.path.join(base_dir, link))


class Metadata(egg_info):
    """Gives the version the local part of TOKENFLOW_LOCAL_VERSION, such as cu130.

    As an option of setup() it would be overridden by the setup.cfg of a source distribution.
    """

    def finalize_options(self) -> None:
        if local := os.environ.get("TOKENFLOW_LOCAL_VERSION"):
            self.tag_build = f"+{local}"
        super().finalize_options()


def kernels() -> dict[str, Any]:
    """What setup() has to know of csrc/: the operators' library, a module of build facts.

    torch is imported here, where something is built: reading metadata needs none.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        fix = "Fix: pip install torch, or leave out --no-build-isolation"
        raise kernel_build.BuildError(f"{sys.executable} has no torch. {fix}") from error
    kernel_build.check_torch(torch.__version__)
    env, mac = os.environ, sys.platform == "darwin"
    cores = os.cpu_count() or 1 if mac else len(os.sched_getaffinity(0))
    cxx = kernel_build.find_compiler(env)
    jobs = kernel_build.job_limit(cores, kernel_build.available_memory(), env.get("MAX_JOBS"))
    home, nvcc = kernel_build.find_toolkit(env)
    cuda, reason = kernel_build.decide_cuda(env.get("TOKENFLOW_CUDA"), torch.version.cuda, nvcc)
    print(f"torch {torch.__version__}, C++ compiler {cxx}, {jobs} at once")
    print(f"CUDA kernels: {'yes' if cuda else 'no'}: {reason}")
    architectures = ""
    if cuda:
        kept, dropped = kernel_build.parse_architectures(env.get("TORCH_CUDA_ARCH_LIST"))
        architectures = ";".join(kept)
        print(f"CUDA architectures: {architectures}; older than 8.0, left out: {dropped or 'none'}")
        env |= {"CUDA_HOME": home, "TORCH_CUDA_ARCH_LIST": architectures}
    env |= {"CXX": cxx, "MAX_JOBS": str(jobs)}
    # torch looks at these variables, and at some of them when this is imported.
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    csrc, flags = str(ROOT / "csrc"), kernel_build.read_flags(ROOT / "csrc/flags.txt")
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*.c*"))
    sets = kernel_build.instruction_sets(cxx, flags, platform.machine())
    parts = {x: [file for file in files if file.endswith(f"_{x}.cpp")] for x in sets}
    facts = {
        "TOKENFLOW_TORCH_VERSION": torch.__version__,
        "TOKENFLOW_CUDA_VERSION": nvcc if cuda else "",
        "TOKENFLOW_CUDA_ARCHITECTURES": architectures,
        "TOKENFLOW_CUDA_REASON": reason,
    }
    info = CppExtension(
        "tokenflow_ext._build_info",
        ["csrc/torch/build_info.cpp", "csrc/cpu/instruction_set.cpp"],
        include_dirs=[csrc],
        define_macros=[(name, json.dumps(fact)) for name, fact in facts.items()],
        extra_compile_args=[*flags["cxx"], "-O0"],
    )
    apart = {info.sources[0], *itertools.chain(*parts.values())}
    abi = "0x{:02x}{:02x}000000000000".format(*kernel_build.MINIMUM_TORCH)
    ops = (CUDAExtension if cuda else CppExtension)(
        "tokenflow_ext.libtokenflow_ops",
        [file for file in files if file.endswith(".cpp") and file not in apart],
        include_dirs=[csrc],
        define_macros=[("TORCH_TARGET_VERSION", abi)]
        + [("USE_CUDA", None), ("TOKENFLOW_WITH_CUDA", None)] * cuda,
        extra_compile_args={"cxx": flags["cxx"], "nvcc": [*flags["nvcc"], f"-ccbin={cxx}"]},
        extra_link_args=[] if mac else ["-Wl,--no-undefined", "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )
    # Of torch the C shim alone, of CUDA the static runtime: all else ties a library to a version.
    info.libraries, ops.libraries = [], ["torch_cpu", "pthread"]
    ops.libraries += ["torch_cuda", "cudart_static", "rt", "dl"] * cuda

    pythons = [x for x in env.get("TOKENFLOW_PYTHONS", "").split(os.pathsep) if x]

    class Wheel(bdist_wheel):
        """One wheel serves every Python that it has a module of build facts for."""

        def get_tag(self) -> tuple[str, str, str]:
            tag = super().get_tag()
            return ("py3", "none", tag[2]) if pythons else tag

    class BuildKernels(BuildExtension):
        def build_extensions(self) -> None:
            # flags.txt is all: Python's own flags may ask for another compiler or processor.
            names = ("compiler_so", "compiler_so_cxx", "compiler_cxx", "linker_exe_cxx")
            self.compiler.set_executables(**dict.fromkeys(names, cxx))
            linker = f"{cxx} -shared" + " -undefined dynamic_lookup" * mac
            self.compiler.set_executables(linker_so_cxx=linker)
            super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            # Objects are kept, so that a second build compiles only what changed.
            self.build_temp = f"build/kernels/{get_platform()}-torch{torch.__version__}/{ext.name}"
            if ext is info:
                # The metadata's, which may have a local part.
                version = self.get_finalized_command("egg_info").egg_version
                ext.define_macros.append(("TOKENFLOW_VERSION", json.dumps(version)))
            for name, part in parts.items() if ext is ops else ():
                folder, arguments = f"{self.build_temp}/{name}", [*flags["cxx"], *flags[name]]
                ext.extra_objects += self.compiler.compile(
                    part, folder, include_dirs=[csrc], extra_postargs=arguments
                )
            # CUDA sources come after torch's check, which refuses an nvcc a major version ahead.
            ext.sources += [file for file in files if file.endswith(".cu") and cuda and ext is ops]
            super().build_extension(ext)
            for python in pythons if ext is info else ():
                self.build_module_for(python)

        def build_module_for(self, python: str) -> None:
            """The module of build facts, which alone depends on Python's version, for another."""
            include, suffix = kernel_build.python_facts(python)
            path = Path(self.get_ext_fullpath(info.name))
            objects = self.compiler.compile(
                info.sources,
                f"{self.build_temp}/{suffix}",
                macros=info.define_macros,
                include_dirs=[include, *info.include_dirs],
                extra_postargs=info.extra_compile_args,
            )
            module = str(path.with_name(path.name.split(".")[0] + suffix))
            self.compiler.link_shared_object(objects, module, target_lang="c++")

        def get_ext_filename(self, name: str) -> str:
            # The operators are a plain shared library: no interpreter's suffix.
            filename = super().get_ext_filename(name)
            return filename.split(".")[0] + ".so" if "_ops" in name else filename

    commands = {"build_ext": BuildKernels, "bdist_wheel": Wheel}
    return {"ext_modules": [ops, info], "cmdclass": commands}


arguments: dict[str, Any] = {"cmdclass": {}}
# These read or pack files, and need neither torch nor a compiler.
if not {"egg_info", "dist_info", "sdist", "build_py"} & set(sys.argv):
    try:
        arguments = kernels()
    except kernel_build.BuildError as error:
        raise SystemExit(f"\ntokenflow_ext cannot be built: {error}\n") from error
arguments["cmdclass"] |= {"egg_info": Metadata, "sdist": SourceDistribution}
setup(packages=find_packages(include=["tokenflow_ext*"]), **arguments)
