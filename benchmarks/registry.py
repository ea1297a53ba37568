"""All cases of the benchmark, and those of them that a run asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase

from benchmarks.case import Case
from benchmarks.cases import (
    connector,
    cross_attention,
    info_nce,
    modulation,
    pipeline,
    redundancy,
    search,
    stream_attention,
)

__all__ = ["EVERY", "cases", "distinct"]


def distinct(found: Iterable[Case]) -> list[Case]:
    """The cases as a list.

    Raises:
        ValueError: two cases of one name.
    """
    every = list(found)
    twice = [name for name, count in Counter(case.name for case in every).items() if count > 1]
    if twice:
        raise ValueError(f"two benchmark cases are called {twice[0]}")
    return every


_MODULES = (connector, cross_attention, info_nce, modulation, pipeline, redundancy, search, stream_attention)
EVERY = distinct(case for module in _MODULES for case in module.CASES)


def cases(device: str | None = None, patterns: Iterable[str] = ()) -> list[Case]:
    """Cases of a device by priority; `patterns` are shell globs, and a pattern without one also matches as a prefix.

    Raises:
        LookupError: a pattern that no case matches.
    """
    found = [case for case in EVERY if device is None or device in case.devices]
    wanted = list(patterns)
    for pattern in wanted:
        if not any(_matches(case.name, pattern) for case in found):
            raise LookupError(f"no case matches {pattern!r}; `python -m benchmarks.run --list` names all")
    if wanted:
        found = [case for case in found if any(_matches(case.name, pattern) for pattern in wanted)]
    return sorted(found, key=lambda case: case.priority)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name == pattern or name.startswith(pattern.rstrip("/") + "/")
