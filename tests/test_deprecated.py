"""Aliases of renamed public names."""

import importlib
import sys
import types
import warnings

import pytest

from tokenflow_ext._deprecated import REMOVED_IN, renamed


@pytest.fixture
def module(monkeypatch):
    module = types.ModuleType("some_module")
    module.Current = type("Current", (), {})
    module.__getattr__ = renamed(
        "some_module", {"Old": "Current", "Moved": "collections.abc:Sequence", "Lost": "Missing"}
    )
    monkeypatch.setitem(sys.modules, "some_module", module)
    return module


def test_an_old_name_is_the_new_object_with_a_warning_at_the_caller(module):
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        assert module.Old is module.Current
    assert str(caught[0].message) == (
        "some_module.Old is now some_module.Current; "
        f"the old name goes in tokenflow_ext {REMOVED_IN}"
    )
    assert caught[0].filename == __file__


def test_an_old_name_may_be_imported_by_name(module):
    with pytest.warns(DeprecationWarning, match=r"some_module\.Old is now some_module\.Current"):
        from some_module import Old
    assert Old is module.Current


def test_a_name_that_moved_comes_from_its_new_module(module):
    from collections.abc import Sequence

    with pytest.warns(DeprecationWarning, match=r"is now collections\.abc\.Sequence"):
        assert module.Moved is Sequence


def test_the_new_name_gives_no_warning(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module("some_module").Current is module.Current


def test_a_name_that_never_was_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="'some_module' has no attribute 'Nothing'"):
        _ = module.Nothing
    assert not hasattr(module, "Nothing")
    with (
        pytest.warns(DeprecationWarning, match="Lost"),
        pytest.raises(AttributeError, match="Missing"),
    ):
        _ = module.Lost
