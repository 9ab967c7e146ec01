"""Imports of torchvision, with compiled operators that load or without."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import sysconfig
from types import ModuleType

import pytest

import tokenflow_ext.models
from tokenflow_ext.models import torchvision_shim as shim


class Inner:
    """A loader whose module raises what it is told, one call after the other."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.calls += 1
        sys.modules["torchvision.half_imported"] = ModuleType("torchvision.half_imported")
        error = self.errors.pop(0)
        if error is not None:
            raise error


def load(monkeypatch, *errors):
    """Executes a module by way of the shim; (the inner loader, how often schemas were declared)."""
    declared = []
    monkeypatch.setattr(shim, "_declare", lambda: declared.append(1))
    monkeypatch.setitem(sys.modules, "torchvision.half_imported", None)
    inner = Inner(*errors)
    loader = shim._Loader(inner)
    module = ModuleType("torchvision")
    module.__spec__ = importlib.machinery.ModuleSpec("torchvision", loader)
    loader.exec_module(module)
    assert module.__spec__.loader is inner  # readers of its files find its own loader
    return inner, declared


def test_nothing_is_declared_where_the_import_works(monkeypatch):
    inner, declared = load(monkeypatch, None)
    assert (inner.calls, declared) == (1, [])


def test_operators_are_declared_where_the_import_asks_for_them(monkeypatch):
    error = RuntimeError("operator torchvision::nms does not exist")
    inner, declared = load(monkeypatch, error, None)
    assert (inner.calls, declared) == (2, [1])


@pytest.mark.parametrize(
    "error", [RuntimeError("different CUDA major versions"), ImportError("torchvision::nms")]
)
def test_other_errors_stay(monkeypatch, error):
    with pytest.raises(type(error), match=str(error)):
        load(monkeypatch, error)


def test_an_error_that_declaring_does_not_mend_stays(monkeypatch):
    again = RuntimeError("operator torchvision::nms does not exist")
    with pytest.raises(RuntimeError, match="torchvision::nms"):
        load(monkeypatch, again, again)


def test_it_concerns_torchvision_alone_and_is_set_once():
    assert tokenflow_ext.models is not None  # whose import registered it
    shim.register()
    finders = [f for f in sys.meta_path if isinstance(f, shim._Finder)]
    assert len(finders) == 1
    assert finders[0].find_spec("torch", None) is None
    assert finders[0].find_spec("torchvision_extras", None) is None


def plain_python(code, *arguments):
    """Runs code in a Python without the start-up files of this environment (-S), and with its
    packages: whatever `make setup` wrote there does not count."""
    start = "import sys; sys.path.append(sys.argv[1])\n"
    packages = sysconfig.get_path("purelib")
    command = [sys.executable, "-S", "-c", start + code, packages, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.once
def test_torchvision_can_be_imported_and_says_whether_it_computes():
    """With operators that load nothing is declared; without, calling one stays an error."""
    code = (
        "import runpy; shim = runpy.run_path(sys.argv[2])\n"
        "declared = shim['ensure_torchvision']()\n"
        "assert shim['ensure_torchvision']() == declared\n"
        "import torchvision\n"
        "torchvision.models.resnet18(weights=None)\n"
        "print(declared, shim['operators_load']())"
    )
    assert sorted(plain_python(code, shim.__file__)) == ["False", "True"]


@pytest.mark.once
def test_an_environment_imports_on_its_own(tmp_path):
    """The two files, in a folder of packages, let a Python that never heard of us import timm."""
    made = shim.install(tmp_path)
    assert sorted(path.suffix for path in made) == [".pth", ".py"]
    assert all(path.parent == tmp_path for path in made)
    code = (
        "import site; site.addsitedir(sys.argv[2])\n"
        "assert 'torch' not in sys.modules, 'a Python that starts must not load torch'\n"
        "import torchvision, timm, open_clip, lpips\n"
        "from transformers import AutoImageProcessor, SiglipVisionModel\n"
        "assert not any(name.startswith('tokenflow') for name in sys.modules)\n"
        "print('imported')"
    )
    assert plain_python(code, tmp_path) == ["imported"]
