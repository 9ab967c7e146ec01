"""Aliases of renamed public names."""

import importlib
import sys
import types
import warnings

import pytest

from tokenflow_ext._deprecated import REMOVED_IN, RenamedAttribute, renamed


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


class Renamed:
    def __init__(self) -> None:
        self.current = 1

    @classmethod
    def make(cls, *, size: int = 0) -> tuple[type, int]:
        return cls, size

    def add(self, one: int, *, two: int = 0) -> int:
        return self.current + one + two

    old = RenamedAttribute("current")
    old_make = RenamedAttribute("make")
    old_add = RenamedAttribute("add", second="two")


def test_an_attribute_of_before_is_read_and_set_with_a_warning():
    instance = Renamed()
    said = rf"Renamed\.old is now Renamed\.current; .* {REMOVED_IN}"
    with pytest.warns(DeprecationWarning, match=said) as caught:
        assert instance.old == 1
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=said):
        instance.old = 5
    assert instance.current == 5


def test_methods_of_before_take_keywords_of_before():
    with pytest.warns(DeprecationWarning, match=r"Renamed\.old_add is now Renamed\.add"):
        assert Renamed().old_add(2, second=3) == 6
    with pytest.warns(DeprecationWarning, match=r"Renamed\.old_add"):
        assert Renamed().old_add(2, two=3) == 6
    with pytest.warns(DeprecationWarning, match=r"Renamed\.old_make"):
        assert Renamed.old_make(size=4) == (Renamed, 4)
    with pytest.warns(match="old_add"), pytest.raises(TypeError, match="stranger"):
        Renamed().old_add(2, stranger=3)
