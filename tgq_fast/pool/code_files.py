"""The quantised codes of a shard, kept beside it: what most of a search reads instead of the rows.

`shard-000000.codes.safetensors` holds the tensors of a :class:`~tgq_fast.search.codes.Codes`, their basis and, as
metadata, their numbers, the format version, the SHA-256 of the shard that they were made from and that of the tensors.
They are derived data: not in the manifest, never trusted unless everything fits, and made again by
:meth:`ItemPool.build_codes`.

Source: ours.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.io.files import write_atomic
from tgq_fast.io.identity import canonical_json
from tgq_fast.io.json_text import read_json
from tgq_fast.search.codes import Basis, Codes

__all__ = ["SUFFIX", "codes_source", "read_codes", "write_codes"]

FORMAT = "tgq-fast codes"
FORMAT_VERSION = "1"
SUFFIX = ".codes.safetensors"
TENSORS = ("codes", "second", "scale", "rest")
BASIS = ("mean", "rotation")
_KEY = "tgq_fast"
_PIECE = 1 << 20


def write_codes(path: Path, codes: Codes, source: str) -> None:
    """Write atomically.

    Args:
        source: SHA-256 of the shard's file.
    """
    basis = codes.basis
    tensors = {name: getattr(codes, name) for name in TENSORS} | {name: getattr(basis, name) for name in BASIS}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": source,
        "checksum": _checksum(tensors, None),
        "basis": [basis.first, basis.second, basis.spread, basis.defect, basis.explained],
        "codes": [codes.rows, codes.step, codes.norm, codes.explained],
    }
    # One entry: safetensors writes several in an arbitrary order, and the same work should give the same bytes.
    write_atomic(path, save(tensors, metadata={_KEY: canonical_json(facts)}))


def codes_source(path: Path) -> str | None:
    """SHA-256 of the shard that codes were made from; None if it cannot be read or is of another format version."""
    try:
        with safe_open(path, framework="pt") as handle:
            return _source(_facts(handle))
    except (SafetensorError, OSError):
        return None


def _facts(handle: Any) -> dict[str, Any]:
    try:
        facts = read_json((handle.metadata() or {}).get(_KEY, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _source(facts: dict[str, Any]) -> str | None:
    current = facts.get("format") == FORMAT and facts.get("format_version") == FORMAT_VERSION
    return facts.get("source") if current else None


def read_codes(path: Path, pool: Tensor, source: str, *, verify: bool, stop: threading.Event | None = None) -> Codes:
    """Memory-mapped codes of the rows of a shard.

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
            names = set(handle.keys())
            tensors = {name: handle.get_tensor(name) for name in (*TENSORS, *BASIS) if name in names}
    except (SafetensorError, OSError) as error:
        raise PoolError(f"{path}: no readable codes ({error})") from None
    if _source(facts) != source:
        raise PoolError(f"{path}: made from another shard or by another release")
    if verify and _checksum(tensors, stop) != facts.get("checksum"):
        raise PoolError(f"{path}: SHA-256 differs; corrupt")
    try:
        basis = Basis(tensors["mean"], tensors["rotation"], *facts["basis"])
        rows, step, norm, share = facts["codes"]
        first, second, scale, rest = (tensors[name] for name in TENSORS)
        codes = Codes(basis, first, second, scale, rest, rows, tuple(step), tuple(norm), share)
        codes.check(pool)
    except (ArgumentError, KeyError, TypeError, ValueError, IndexError) as error:
        raise PoolError(f"{path}: {error}") from None
    return codes


def _checksum(tensors: dict[str, Tensor], stop: threading.Event | None) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            digest.update(data[start : start + _PIECE])
            if stop is not None and stop.is_set():
                raise InterruptedError("reading codes was called off")
    return digest.hexdigest()
