"""Pretrained weights that tests use where they are installed."""

from __future__ import annotations

import pytest

from tokenflow_ext.models import WeightsError
from tokenflow_ext.models.towers.teachers import find_efficientnet_lite0


def _missing() -> str | None:
    try:
        find_efficientnet_lite0()
    except WeightsError as error:
        return str(error)
    return None


LITE0_MISSING = _missing()
needs_lite0 = pytest.mark.skipif(LITE0_MISSING is not None, reason=LITE0_MISSING or "")
