"""The command ``tokenflow``."""

from tokenflow_ext._deprecated import renamed

# This folder has the name of a module that held these.
__getattr__ = renamed(
    __name__,
    {
        "main": f"{__name__}.entry:main",
        "reconstruct": f"{__name__}.commands.reconstruct:reconstruct",
        "tokenize": f"{__name__}.commands.tokenize:tokenize",
    },
)
