"""The one reader of JSON: whatever is wrong with a text is a ValueError, and an object names each key once.

Python's own keeps the last of equal keys without a word, and answers deep nesting with a RecursionError whose limit is
that of the release and of who calls.

Source: ours.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

__all__ = ["MAX_DEPTH", "levels", "read_json"]

MAX_DEPTH = 100
"""Lists and objects within each other: what was read can be written again, whoever calls."""

_TOO_DEEP = f"more than {MAX_DEPTH} lists and objects within each other"


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text; bytes are UTF-8, with or without a byte-order mark.

    Raises:
        TypeError: no text.
        ValueError: not UTF-8, not JSON, more than `MAX_DEPTH` deep, or an object with a key twice.
    """
    if isinstance(text, (bytes, bytearray)):
        text = text.decode("utf-8-sig")
    try:
        value = _strict.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and sum(1 for _ in levels(value)) > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    return value


def levels(value: Any) -> Iterator[list[Any]]:
    """The lists and objects of a value, level after level."""
    level = [value] if type(value) in (dict, list) else []
    while level:
        yield level
        inner = (part.values() if type(part) is dict else part for part in level)
        level = [child for children in inner for child in children if type(child) in (dict, list)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in an object")
    return found


_strict = json.JSONDecoder(object_pairs_hook=_object)
