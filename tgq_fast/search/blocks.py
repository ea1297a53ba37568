"""Cuts a pool into blocks of rows, searched one after another; each is made ready while the one before is searched.

A block is a stretch of one large shard, in place in its memory map, or several small shards joined in memory: a search
of many small parts costs more than one of their sum. What is joined is kept for the next search while all of it is
small. Making ready means checking size and SHA-256, mapping, and asking the system to read the rows from the disk.

Source: ours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

__all__ = ["BLOCK_BYTES", "Block", "Part", "cut_blocks", "one_ahead", "read_ahead"]

BLOCK_BYTES = 128 << 20

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Part:
    """Rows `first` … `stop` of one shard."""

    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Rows of the pool from `start` on."""

    start: int
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.stop - part.first for part in self.parts)


def cut_blocks(sizes: Sequence[int], row_bytes: int, shards: range, block_bytes: int | None = None) -> list[Block]:
    """Blocks of at most `block_bytes`, else :data:`BLOCK_BYTES`, and at least a row that cover these shards in order.

    Args:
        sizes: rows of every shard of the pool.
        row_bytes: bytes of a row.
        shards: the shards to cover.
    """
    most = max(1, min(BLOCK_BYTES, block_bytes or BLOCK_BYTES) // max(1, row_bytes))
    step = most // 16 * 16 or most  # codes lie in groups of 16 rows
    blocks: list[Block] = []
    joined: list[Part] = []
    start = end = sum(sizes[: shards.start])
    for shard in shards:
        size = sizes[shard]
        if joined and end - start + size > most:
            blocks.append(Block(start, tuple(joined)))
            joined, start = [], end
        if size > most:
            for first in range(0, size, step):
                blocks.append(Block(end + first, (Part(shard, first, min(first + step, size)),)))
            start = end + size
        elif size:
            joined.append(Part(shard, 0, size))
        end += size
    if joined:
        blocks.append(Block(start, tuple(joined)))
    return blocks


class _Ahead(Generic[R]):
    """One call in a thread of its own."""

    def __init__(self, call: Callable[[], R]) -> None:
        self._call = call
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="tgq-read-ahead")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._failure = error

    def join(self) -> None:
        self._thread.join()

    def result(self) -> R:
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._result


def one_ahead(prepare: Callable[[T, threading.Event], R], things: Sequence[T]) -> Generator[R, None, None]:
    """`prepare(thing, stop)` of each thing in order; while one is in use, the next is prepared in another thread.

    An error of `prepare` is raised where its thing is due. When the iterator is closed early, `stop` is set, and what
    is under way is waited for.
    """
    stop = threading.Event()
    if len(things) == 1:  # nothing to do meanwhile: no thread
        yield prepare(things[0], stop)
        return
    coming = _Ahead(lambda: prepare(things[0], stop)) if things else None
    try:
        for number in range(len(things)):
            assert coming is not None
            ready, coming = coming.result(), None
            if number + 1 < len(things):
                coming = _Ahead(lambda following=things[number + 1]: prepare(following, stop))  # type: ignore[misc]
            yield ready
            del ready
    finally:
        stop.set()
        if coming is not None:
            coming.join()


def read_ahead(path: Path, first: int, count: int) -> None:
    """Asks the system to read `count` bytes of a file from byte `first` on, where it can be asked."""
    if hasattr(os, "posix_fadvise") and count:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, first, count, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)
