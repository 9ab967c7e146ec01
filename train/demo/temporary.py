"""Where Gradio may write. Imports nothing of it: it decides on some of its folders when it is
imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# The second is of matplotlib, which Gradio imports: it keeps a list of fonts.
_VARIABLES = ("GRADIO_TEMP_DIR", "MPLCONFIGDIR")


@contextmanager
def folder_of_gradio() -> Iterator[str]:
    """A folder for all that Gradio writes (what is uploaded and shown), which is removed at the
    end. To be entered before Gradio is imported."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    with tempfile.TemporaryDirectory(prefix="tokenflow-demo-", ignore_cleanup_errors=True) as made:
        os.environ.update(dict.fromkeys(_VARIABLES, made))
        try:
            yield made
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
