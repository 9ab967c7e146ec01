"""The error of everything here."""

from __future__ import annotations


class SassError(RuntimeError):
    """The tools, the objects or the text that they print are not what this needs."""
