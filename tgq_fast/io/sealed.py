"""JSON documents that carry a checksum over themselves, so that one changed character is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["CHECKSUM", "seal", "unseal"]

CHECKSUM = "checksum"


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its checksum as a further entry."""
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in values.items() if k != CHECKSUM}))
    return plain | {CHECKSUM: _digest(plain)}


def unseal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The document without its checksum; one that has none, as older versions wrote it, is taken as it is.

    Raises:
        ValueError: the checksum is that of another content.
    """
    plain = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != _digest(plain):
        raise ValueError(
            f"changed since it was written: its {CHECKSUM!r} is that of another content. Restore it; or, if the change "
            f"is meant, take the entry {CHECKSUM!r} out"
        )
    return plain


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
