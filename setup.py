"""Builds the kernels; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import kernel_build  # noqa: E402

OPS = "tokenflow_ext.libtokenflow_ops"
BUILD_INFO = "tokenflow_ext._build_info"


class BuildKernels(build_ext):
    """Compiles csrc/ with the flags each file needs, in place of setuptools' one set for all."""

    plan: kernel_build.Plan
    objects: dict[Path, Path]

    def get_ext_filename(self, fullname: str) -> str:
        # A plain shared library, loaded by torch.ops.load_library: no interpreter's suffix.
        # setuptools also asks for names without their package.
        if fullname.rpartition(".")[2] == OPS.rpartition(".")[2]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        try:
            self.plan = kernel_build.make_plan(ROOT, self.distribution.get_version())
            print(self.plan.summary(), flush=True)
            with kernel_build.locked(self.plan):
                self.objects = kernel_build.compile_all(
                    self.plan,
                    kernel_build.build_info_sources(self.plan)
                    + kernel_build.ops_sources(self.plan),
                )
                super().build_extensions()
        except kernel_build.BuildError as error:
            raise SystemExit(f"\ntokenflow_ext cannot be built: {error}\n") from error

    def build_extension(self, ext: Extension) -> None:
        link = kernel_build.link_ops if ext.name == OPS else kernel_build.link_build_info
        link(self.plan, self.objects, Path(self.get_ext_fullpath(ext.name)).resolve())


class SourceDistribution(sdist):
    """Keeps the links that put models/ and train/ inside the package, in the place of copies."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for link in LINKS:
            os.symlink(os.readlink(ROOT / link), os.path.join(base_dir, link))


# tokenflow_ext.models and tokenflow_ext.train lie beside the library, one folder each, and links
# lead to them: nothing called "models" or "train" gets into an environment.
LINKS = ("tokenflow_ext/models", "tokenflow_ext/train")

setup(
    packages=find_packages(include=["tokenflow_ext*"]),
    ext_modules=[Extension(OPS, sources=[]), Extension(BUILD_INFO, sources=[])],
    cmdclass={"build_ext": BuildKernels, "sdist": SourceDistribution},
)
