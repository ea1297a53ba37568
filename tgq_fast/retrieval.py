"""Deprecated: what was here is in `tgq_fast.search`, `tgq_fast.pool` and `tgq_fast.evaluation`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_PLACES = ("tgq_fast.search", "tgq_fast.pool", "tgq_fast.evaluation")


def __getattr__(name: str) -> Any:
    for place in _PLACES:
        module = importlib.import_module(place)
        if name in module.__all__:
            warnings.warn(f"tgq_fast.retrieval.{name} is {place}.{name} now", DeprecationWarning, stacklevel=2)
            return getattr(module, name)
    raise AttributeError(f"module 'tgq_fast.retrieval' has no attribute {name!r}: see {', '.join(_PLACES)}")
