"""The console script ``tokenflow``: the command, or one line that says what is not installed."""

from __future__ import annotations

import sys

from tokenflow_ext.train.engine.missing_package import not_installed


def main() -> None:
    """Run the command."""
    try:
        from .commands import main as command
    except ModuleNotFoundError as error:
        sys.exit(not_installed(error))
    command()
