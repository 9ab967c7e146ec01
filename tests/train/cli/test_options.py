"""The commands' options: one name for each thing, and the names of before."""

from __future__ import annotations

import argparse
import math

import pytest

from tokenflow_ext._deprecated import REMOVED_IN
from tokenflow_ext.train.cli import commands, options
from tokenflow_ext.train.data import DataError


def parsers() -> dict[str, argparse.ArgumentParser]:
    made = {}
    for name, command in commands.COMMANDS.items():
        made[name] = argparse.ArgumentParser(name)
        command.add_arguments(made[name])
    return made


def shown(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options that --help shows, by name."""
    return {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.help is not argparse.SUPPRESS
    }


def test_an_option_is_the_same_in_every_command():
    """Of one name there is one type, and one default but for folders and batches."""
    seen: dict[str, argparse.Action] = {}
    several = {"--out", "--batch-size", "--checkpoint", "--weights"}
    for parser in parsers().values():
        for name, action in shown(parser).items():
            first = seen.setdefault(name, action)
            assert action.type == first.type, name
            if name not in several:
                assert (action.default, action.nargs) == (first.default, first.nargs), name


def test_no_command_has_two_names_for_one_thing():
    names = {name for parser in parsers().values() for name in shown(parser)}
    assert not names & {"--batch", "--shard", "--batchsize", "--batch_size", "--output"}
    assert {"--batch-size", "--shard-size", "--out", "--device", "--overwrite"} <= names


@pytest.mark.parametrize(("old", "new"), [("--batch", "--batch-size"), ("--shard", "--shard-size")])
def test_names_of_before_warn(old, new):
    parser = parsers()["tokenize"]
    common = ["folder", "--checkpoint", "somewhere"]
    key = new.removeprefix("--").replace("-", "_")
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {new}; .* {REMOVED_IN}"):
        assert getattr(parser.parse_args([*common, old, "7"]), key) == 7
    assert getattr(parser.parse_args([*common, new, "7"]), key) == 7
    assert old + " " not in parser.format_help()


@pytest.mark.parametrize("value", [0, -3, math.nan, math.inf, 2**31])
def test_counts_out_of_range_name_their_option(value):
    with pytest.raises(DataError, match=r"--batch-size must be .*, got"):
        options.check_counts(argparse.Namespace(batch_size=value), batch_size=1)


def test_counts_in_range_and_none_pass():
    given = argparse.Namespace(limit=None, batch_size=1, workers=0)
    options.check_counts(given, limit=1, batch_size=1, workers=0)
