"""What makes lmms-eval read our understanding models: importing this package.

lmms-eval loads the entry points ``lmms_eval.models`` before it makes a model. With this one
imported, transformers knows the vision model, and lmms-eval's own ``llava_hf`` takes a saved folder
as it is.
"""

from __future__ import annotations

from typing import Any


def manifests() -> tuple[Any, ...]:
    """No model class of our own: ``llava_hf`` serves."""
    return ()
