"""The console script ``tokenflow``: the command, or one line that says what is not installed."""

from __future__ import annotations

import sys


def not_installed(error: ModuleNotFoundError) -> str:
    """The line about a package that is missing.

    Raises:
        ModuleNotFoundError: it is a part of this one, which is a fault of the program.
    """
    if (error.name or "tokenflow_ext").partition(".")[0] == "tokenflow_ext":
        raise error
    return f"error: {error.name} is not installed: pip install 'tokenflow_ext[train]'"


def main() -> None:
    """Run the command."""
    try:
        from .cli import main as command
    except ModuleNotFoundError as error:
        sys.exit(not_installed(error))
    command()


if __name__ == "__main__":
    main()
