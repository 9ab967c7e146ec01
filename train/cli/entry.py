"""The console script ``tokenflow``: a command, or one line that says what is not installed."""

from __future__ import annotations

import sys

from tokenflow_ext.train.engine.missing_package import not_installed


def main(argv: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        argv: its name and arguments; by default those of the process.
    """
    try:
        from tokenflow_ext.train.engine.messages import ending_in_one_line

        from . import commands
    except ModuleNotFoundError as error:
        sys.exit(not_installed(error))
    with ending_in_one_line():
        run, arguments = commands.parse(sys.argv[1:] if argv is None else argv)
        run(arguments)
