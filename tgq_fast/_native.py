"""Loads the C++/CUDA extension `tgq_fast._C` and says why it is missing when it is.

The extension has no torch dependency and loads on machines without a GPU. Nothing here raises on a missing
extension: callers ask :func:`available` or :func:`why_missing` and pick another backend.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("tgq_fast._C"), ""
    except ModuleNotFoundError:
        return None, "the extension is not built: run `pip install .` from the source tree"
    except ImportError as error:  # built for another Python, a missing libstdc++ ...
        return None, f"the extension does not load: {error}"


def extension() -> ModuleType | None:
    """The module `tgq_fast._C`, or None when it is not built or does not load."""
    return _load()[0]


def available() -> bool:
    """Whether the compiled extension loads."""
    return extension() is not None


def why_missing() -> str:
    """The reason the extension is missing; an empty string when it is there."""
    return _load()[1]


def build_info() -> dict[str, Any]:
    """Build facts: version, commit, compiler, build type, CUDA version and architectures, why there is no CUDA.

    Also what this machine runs: `isa` (the instruction set that search uses) and `isas` (all that can be forced
    through `TGQ_ISA`). Empty when the extension is missing.
    """
    module = extension()
    return {} if module is None else dict(module.build_info())
