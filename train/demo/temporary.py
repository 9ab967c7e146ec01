"""Where Gradio may write. Imports nothing of it: it decides on some of its folders when it is
imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "GRADIO_TEMP_DIR"


@contextmanager
def folder_of_gradio() -> Iterator[str]:
    """A folder for all that Gradio writes (what is uploaded and shown), which is removed at the
    end. To be entered before Gradio is imported."""
    before = os.environ.get(_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="tokenflow-demo-", ignore_cleanup_errors=True) as made:
        os.environ[_VARIABLE] = made
        try:
            yield made
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
