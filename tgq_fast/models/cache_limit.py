"""Keeps the folder of frozen features below a size: what was used longest ago goes first.

The limit is `$TGQ_CACHE_LIMIT`, such as 50GB; without it nothing is ever removed. A cache in use may go too: who has it
open keeps its memory maps, and who needs it again computes it again.

Source: ours.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from tgq_fast.errors import ArgumentError

__all__ = ["cache_limit", "evict", "used"]

VARIABLE = "TGQ_CACHE_LIMIT"
KINDS = ("features", "fields", "views", "whitened")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MANIFEST = "manifest.json"


def cache_limit() -> int | None:
    """Bytes of `$TGQ_CACHE_LIMIT`; None: no limit.

    Raises:
        ArgumentError: it is no size.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text, re.IGNORECASE)
    if found is None:
        raise ArgumentError(VARIABLE, repr(text), "a size in bytes, or one such as 500MB or 50GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def used(folder: Path) -> None:
    """Say that a complete cache is in use now; on a disk that is read only nothing is said."""
    with contextlib.suppress(OSError):
        os.utime(folder / _MANIFEST)


def evict(root: Path, keep: Path, limit: int | None = None) -> list[Path]:
    """Remove complete caches until what is left fits the limit; returns which.

    Args:
        root: of the caches.
        keep: one that stays, however large it is.
        limit: bytes; None: of the environment.
    """
    most = cache_limit() if limit is None else limit
    if most is None:
        return []
    known: list[tuple[float, Path, int]] = []
    total = 0
    for folder in (entry for kind in KINDS for entry in (root / kind).glob("*")):
        with contextlib.suppress(OSError):  # another process removes it just now
            size = sum(entry.stat().st_size for entry in folder.iterdir())
            total += size
            if folder != keep and not (folder / "journal.jsonl").exists():  # one that is being made stays
                known.append(((folder / _MANIFEST).stat().st_mtime, folder, size))
    gone = []
    for _, folder, size in sorted(known):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            (folder / _MANIFEST).unlink()  # from here on it is no cache
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
            gone.append(folder)
    return gone
