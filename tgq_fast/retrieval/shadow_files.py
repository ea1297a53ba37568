"""The low-precision shadow of a shard, kept beside it: a quarter of the bytes that most of a search reads.

`shard-000000.shadow.safetensors` holds the tensors of a :class:`~tgq_fast.retrieval.topk_native.Shadow` and, as
metadata, the format version, the SHA-256 of the shard that it was made from and that of its own tensors. It is derived
data: not in the manifest, never trusted unless everything fits, and made again by :meth:`ItemPool.build_shadow`.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tgq_fast.data.files import write_atomic
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.retrieval._identity import canonical_json
from tgq_fast.retrieval.topk_native import Shadow

__all__ = ["SUFFIX", "join_shadows", "read_shadow", "rows_of", "shadow_source", "write_shadow"]

FORMAT = "tgq-fast shadow"
FORMAT_VERSION = "1"
SUFFIX = ".shadow.safetensors"
TENSORS = ("codes", "scale", "norm", "error")
_KEY = "tgq_fast"
_PIECE = 1 << 20


def write_shadow(path: Path, shadow: Shadow, source: str) -> None:
    """Write atomically.

    Args:
        source: SHA-256 of the shard's file.
    """
    tensors = {name: getattr(shadow, name) for name in TENSORS}
    facts = {"format": FORMAT, "format_version": FORMAT_VERSION, "source": source, "checksum": _checksum(tensors, None)}
    # One entry: safetensors writes several in an arbitrary order, and the same work should give the same bytes.
    write_atomic(path, save(tensors, metadata={_KEY: canonical_json(facts)}))


def shadow_source(path: Path) -> str | None:
    """SHA-256 of the shard that a shadow was made from; None if it cannot be read or is of another format version."""
    try:
        with safe_open(path, framework="pt") as handle:
            return _source(_facts(handle))
    except (SafetensorError, OSError):
        return None


def _facts(handle: Any) -> dict[str, Any]:
    try:
        facts = json.loads((handle.metadata() or {}).get(_KEY, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _source(facts: dict[str, Any]) -> str | None:
    current = facts.get("format") == FORMAT and facts.get("format_version") == FORMAT_VERSION
    return facts.get("source") if current else None


def read_shadow(path: Path, pool: Tensor, source: str, *, verify: bool, stop: threading.Event | None = None) -> Shadow:
    """Memory-mapped shadow of the rows of a shard.

    Args:
        pool: [n, D] the shard's rows.
        source: SHA-256 of the shard's file.
        verify: check the SHA-256 of the tensors.
        stop: once set, verifying ends with InterruptedError.

    Raises:
        PoolError: damaged, stale, or of another format version.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            facts = _facts(handle)
            tensors = {name: handle.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError) as error:
        raise PoolError(f"{path}: not a readable shadow ({error})") from None
    if _source(facts) != source:
        raise PoolError(f"{path}: made from another shard or by another release")
    shadow = Shadow(**tensors)
    try:
        shadow.check(pool)
    except ArgumentError as error:
        raise PoolError(f"{path}: {error}") from None
    if verify and _checksum(tensors, stop) != facts.get("checksum"):
        raise PoolError(f"{path}: SHA-256 differs; corrupt")
    return shadow


def rows_of(shadow: Shadow, rows: slice | Tensor) -> Shadow:
    """The shadow of some rows: a slice of it, or a copy of the rows that a tensor names."""
    return Shadow(*(getattr(shadow, name)[rows] for name in TENSORS))


def join_shadows(parts: list[Shadow]) -> Shadow:
    """The shadow of several pools one after another."""
    return parts[0] if len(parts) == 1 else Shadow(*(torch.cat([getattr(p, name) for p in parts]) for name in TENSORS))


def _checksum(tensors: dict[str, Tensor], stop: threading.Event | None) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            digest.update(data[start : start + _PIECE])
            if stop is not None and stop.is_set():
                raise InterruptedError("reading a shadow was called off")
    return digest.hexdigest()
