"""``python -m tokenflow_ext.train.cli``: the command, as torchrun starts it."""

from tokenflow_ext.train.cli.entry import main

if __name__ == "__main__":
    main()
