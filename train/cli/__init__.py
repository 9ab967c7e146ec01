"""The command ``tokenflow``."""

from tokenflow_ext._deprecated import renamed

# This folder has the name of the module that commands.py was.
__getattr__ = renamed(
    __name__,
    {name: f"{__name__}.commands:{name}" for name in ("main", "reconstruct", "tokenize")},
)
