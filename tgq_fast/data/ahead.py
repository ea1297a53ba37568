"""Work that threads do ahead of whoever needs its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["in_order"]


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], inputs: Sequence[Any], ahead: int) -> Iterator[Any]:
    """`map` that keeps at most `ahead` results in flight, so that memory does not grow with the input."""
    waiting: list[Future[Any]] = []
    for start in range(0, len(inputs) + ahead):
        if start < len(inputs):
            waiting.append(pool.submit(work, inputs[start]))
        if start >= ahead - 1 and waiting:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()
