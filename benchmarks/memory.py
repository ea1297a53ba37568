"""Peak memory of one call: the CUDA caching allocator's statistics, or the resident set's high-water mark on a CPU."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1]) * 1024


def _trim() -> None:
    """Hand freed heap pages back, or a call would reuse them unseen."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: the figure may then be too low
        return


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that `call` had in use at its peak above what was in use before, its result included.

    None where the system offers no high-water mark that can be reset (CPU, outside Linux).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        _trim()
        _CLEAR.write_text("5")  # VmHWM := VmRSS
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM")
    except OSError:
        return None
    del result
    return max(0, peak - before)
