"""What is said where a package is missing. Imports nothing that may be missing."""

from __future__ import annotations


def not_installed(error: ModuleNotFoundError) -> str:
    """The line about a package that is missing.

    Raises:
        ModuleNotFoundError: it is a part of this one, which is a fault of the program.
    """
    if (error.name or "tokenflow_ext").partition(".")[0] == "tokenflow_ext":
        raise error
    return f"error: {error.name} is not installed: pip install 'tokenflow_ext[train]'"
