"""The console script ``tokenflow``: the command, or one line that says what is not installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command."""
    try:
        from tokenflow_ext.train.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "tokenflow_ext").partition(".")[0] == "tokenflow_ext":
            raise
        sys.exit(f"error: {error.name} is not installed: pip install 'tokenflow_ext[train]'")
    command()


if __name__ == "__main__":
    main()
