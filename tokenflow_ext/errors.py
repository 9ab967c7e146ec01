"""The errors of this package. `TokenFlowError` is the base of all of them.

Each has a builtin base too, so that `except ValueError` catches a `ConfigError`. An argument of a
function that does not fit raises a plain ValueError, TypeError or RuntimeError, as in torch.
"""

from __future__ import annotations

import os


class TokenFlowError(Exception):
    """What options, files or the machine are to blame for. The message says what and where."""


class KernelsMissingError(TokenFlowError, ImportError):
    """The compiled operators are missing or do not load; the message says how to build them."""


class BuildFactsMissingError(TokenFlowError, ImportError):
    """The operators are there, and the module of build facts for this Python is not: `build_info()`
    alone does not work."""


class InstructionSetError(TokenFlowError, RuntimeError):
    """TOKENFLOW_CPU names no instruction set of this machine; the message says which it has."""


class ConfigError(TokenFlowError, ValueError):
    """A configuration that cannot be built: the message names the field and what was got."""


class CheckpointError(TokenFlowError, RuntimeError):
    """A saved tokenizer that is missing, incomplete, truncated or not one of ours."""


class WeightsError(TokenFlowError, RuntimeError):
    """A weight file that is missing, unreadable or not the one wanted."""


class MissingPackageError(TokenFlowError, ImportError):
    """A package that an optional part needs is not installed: the message says which, and how to
    get it."""


class OutputError(TokenFlowError, RuntimeError):
    """A place that cannot be written to, or holds something that must not be written over."""


class NotFiniteError(TokenFlowError, FloatingPointError):
    """Training has left the finite numbers: the message says what is left of the run."""


class DataError(TokenFlowError, RuntimeError):
    """Data that are missing, unreadable or too few. The message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split("\n"))))


class BrokenImageError(DataError):
    """Bytes that are there but are no image that can be decoded; ``why`` says it without a name."""

    why = ""


def printable(text: str | os.PathLike[str]) -> str:
    r"""`text` for messages, logs and listings: one line that every terminal and file takes.

    Names of files may be any bytes. Python keeps those that are no UTF-8 as lone surrogates, which
    cannot be written: they become `\xe9`. Line ends and other characters that do not print are
    escaped too.
    """

    def shown(character: str) -> str:
        if character.isprintable():
            return character
        if "\udc80" <= character <= "\udcff":
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode("ascii")

    return "".join(map(shown, os.fspath(text)))
