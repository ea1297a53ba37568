"""One boundary for plain mistakes: arguments whose type cannot be the annotated one are named before anything is done.

Source: ours.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tgq_fast.errors import ArgumentError

__all__ = ["checked", "row_numbers"]

_LONGEST_NAME = 255  # bytes of a file's name
F = TypeVar("F", bound=Callable[..., Any])


def _whole(value: object) -> bool:
    if getattr(value, "ndim", 0):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]  # that is the question
    except Exception:
        return False
    return True


def _path(value: object) -> bool:
    if not isinstance(value, (str, os.PathLike)) or "\0" in (text := os.fspath(value)):
        return False
    return max(map(len, os.fsencode(text).split(os.sep.encode()))) <= _LONGEST_NAME  # the system refuses to look


# Annotation → (test, in words). One that is not here is the function's own to check.
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "int": (_whole, "a whole number"),
    "float": (lambda value: isinstance(value, numbers.Real) and not getattr(value, "ndim", 0), "a number"),
    "str": (lambda value: isinstance(value, str), "text"),
    "bool": (lambda value: type(value).__name__ in ("bool", "bool_"), "True or False"),
    "Path": (_path, "a path"),
    "None": (lambda value: value is None, "None"),
}


_OWN = {"Catalog": "a Catalog", "ItemPool": "an ItemPool", "TGQFormerConfig": "a TGQFormerConfig"}


def _kind(part: str) -> tuple[Callable[[object], bool], str] | None:
    """The test of one type of an annotation."""
    if part in _OWN:
        return lambda value: any(base.__name__ == part for base in type(value).__mro__), _OWN[part]
    if part == "Sequence[str]":
        return lambda value: hasattr(value, "__iter__") and not isinstance(value, (str, bytes)), "a list of texts"
    if part.startswith("Iterable[") and part.endswith("]"):
        return lambda value: hasattr(value, "__iter__") and not isinstance(value, (str, bytes)), "something to iterate"
    if part.startswith("Mapping[") and part.endswith("]"):
        return lambda value: isinstance(value, Mapping), "a mapping"
    return _KINDS.get(part)


@functools.cache
def _expected(annotation: str) -> list[tuple[Callable[[object], bool], str]]:
    """The tests of an annotation such as "str | Path | None", of which one must hold; none for one of other types."""
    parts = annotation.split(" | ")
    if "str" in parts and "Path" in parts:
        parts.remove("str")
    kinds = [_kind(part) for part in parts]
    return [kind for kind in kinds if kind is not None] if all(kinds) else []


def checked(function: F) -> F:
    """Check whole numbers, numbers, texts, flags, paths, catalogues and pools of each call against the annotations.

    The annotations must be text (`from __future__ import annotations`).

    Raises:
        ArgumentError: by the function, before it runs.
    """
    signature = inspect.signature(function)
    tests = {p.name: _expected(p.annotation) for p in signature.parameters.values() if isinstance(p.annotation, str)}
    tests = {name: found for name, found in tests.items() if found}

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, found in tests.items():
            if name in given and not any(test(given[name]) for test, _ in found):
                value = given[name]
                shown = f"{type(value).__name__} {_short(value)}"
                raise ArgumentError(name, shown, " or ".join(words for _, words in found))
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def _short(value: object) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # a text of its own that fails
        return ""


def row_numbers(name: str, given: Any, count: int) -> NDArray[np.int64]:
    """Rows [B] of something that has so many; a mask or fractions are none, though numpy would take them for some.

    Raises:
        ArgumentError: something else than whole numbers, or one out of range.
    """
    try:
        rows = np.asarray(given).reshape(-1)
    except Exception:
        rows = np.array([given], dtype=object)
    if rows.size and rows.dtype.kind not in "iu":
        raise ArgumentError(name, f"a {type(given).__name__} of {rows.dtype}", "whole numbers")
    rows = rows.astype(np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= count):
        raise ArgumentError(name, f"{rows.min()} … {rows.max()}", f"rows in 0 … {count - 1}")
    return rows
