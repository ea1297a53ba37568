"""Searches a pool in host memory for queries on a CUDA device, however large the pool is.

Parts of the pool travel through two buffers on the device: one is filled while the other is searched. The search of a
part goes on from the answer over the parts before it, so floors are carried along and the result is exact. Memory that
the device cannot read by itself (pageable memory, a memory map) passes through two pinned buffers that a host thread
fills. :func:`stream` holds the order in which all this happens; what it orders is behind :class:`Lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError
from tgq_fast.reference import TopK
from tgq_fast.search import topk_cuda

SLOTS = 2  # buffers of each kind: one is filled while the other is used
AHEAD = 3  # parts whose work may be queued before the host waits: Ctrl-C and progress are this late
CHUNK_BYTES = 32 << 20  # of one part: long enough to hide the launches of its search, little beside 256 MB
_ROW_TILE = 128  # parts are whole filter tiles
COPIES, SEARCHES = "copies", "searches"


class Lanes(Protocol):
    """Two lanes of device work. Work of one lane runs in order; lanes meet only at marks."""

    def stage(self, slot: int, begin: int, end: int) -> None:
        """Copies pool rows [begin, end) to pinned buffer `slot`, on the host, before it returns."""

    def copy(self, slot: int, begin: int, end: int) -> Any:
        """Queues the copy of these rows to device buffer `slot`; returns a mark in the lane of copies."""

    def search(self, slot: int, begin: int, end: int) -> Any:
        """Queues the search of device buffer `slot`; returns a mark in the lane of searches."""

    def wait(self, lane: str, mark: Any) -> None:
        """Later work of the lane waits for the mark."""

    def finish(self, mark: Any) -> None:
        """The host waits for the mark."""


def stream(
    lanes: Lanes, parts: Sequence[tuple[int, int]], staged: bool, progress: Callable[[float], None] | None = None
) -> None:
    """Searches the parts [begin, end) in turn. When it returns or raises every copy has ended; searches are queued."""
    copied: list[Any] = []
    searched: list[Any] = []
    total = max(1, parts[-1][1])

    def stage(i: int) -> None:
        if i >= SLOTS:
            lanes.finish(copied[i - SLOTS])  # the pinned buffer has been read
        lanes.stage(i % SLOTS, *parts[i])

    with ThreadPoolExecutor(1, thread_name_prefix="tgq-stage") as host:
        try:
            ready = host.submit(stage, 0) if staged else None
            for i, (begin, end) in enumerate(parts):
                if ready is not None:
                    ready.result()
                if i >= SLOTS:
                    lanes.wait(COPIES, searched[i - SLOTS])  # the device buffer has been searched
                copied.append(lanes.copy(i % SLOTS, begin, end))
                if staged and i + 1 < len(parts):
                    ready = host.submit(stage, i + 1)
                lanes.wait(SEARCHES, copied[i])
                searched.append(lanes.search(i % SLOTS, begin, end))
                if i >= AHEAD:
                    lanes.finish(searched[i - AHEAD])
                    if progress is not None:
                        progress(parts[i - AHEAD][1] / total)
        finally:
            if copied:
                lanes.finish(copied[-1])


def split(rows: int, width: int, element_size: int, chunk_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
    """Parts [begin, end) of a pool [rows, width], of at most `chunk_bytes` or one tile of rows."""
    step = max(_ROW_TILE, chunk_bytes // max(1, width * element_size) // _ROW_TILE * _ROW_TILE)
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def search(
    queries: Tensor,
    pool: Tensor,
    k: int,
    exclude: Tensor | None,
    out: TopK,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
    *,
    tuning: dict[str, Any] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> TopK:
    """Searches pool [N, D] in host memory for queries [Q, D] on a CUDA device; `out` and `exclude` are there too.

    Returns when the whole pool has been read, with the last searches queued on the current stream. `progress` is called
    for every part that has been searched. `tuning` and `chunk_bytes` are for tests and measurements.

    Raises:
        ArgumentError: a CUDA graph is being captured: it cannot hold waits of the host.
        BackendError: the device cannot run the search, or its memory is exhausted.
    """
    with torch.cuda.device(queries.device):
        if torch.cuda.is_current_stream_capturing():
            raise ArgumentError("pool", "host memory during the capture of a CUDA graph", "a pool on the device")
        parts = split(pool.shape[0], pool.shape[1], pool.element_size(), chunk_bytes)
        if not parts or not len(queries):
            nothing = pool.new_empty((0, pool.shape[1]), device=queries.device)
            return topk_cuda.search(queries, nothing, k, exclude, out, threads, progress, tuning=tuning)
        lanes = _CudaLanes(queries, pool, k, exclude, out, parts[0][1], tuning)
        stream(lanes, parts, lanes.staged, progress)
    if progress is not None:
        progress(1.0)
    return out


class _CudaLanes:
    """The lanes of one search: the current stream searches, a second one copies."""

    def __init__(
        self,
        queries: Tensor,
        pool: Tensor,
        k: int,
        exclude: Tensor | None,
        out: TopK,
        rows: int,
        tuning: dict[str, Any] | None,
    ) -> None:
        self.pool = pool
        self.request = (queries, k, exclude, out, tuning)
        self.staged = not (pool.is_contiguous() and pool.is_pinned())
        shape = (rows, pool.shape[1])
        self.buffers = [torch.empty(shape, dtype=pool.dtype, device=queries.device) for _ in range(SLOTS)]
        slots = SLOTS if self.staged else 0
        self.pinned = [torch.empty(shape, dtype=pool.dtype, pin_memory=True) for _ in range(slots)]
        self.streams = {SEARCHES: torch.cuda.current_stream(), COPIES: torch.cuda.Stream()}
        # The buffers may be memory that earlier work of the current stream still uses.
        self.streams[COPIES].wait_stream(self.streams[SEARCHES])

    def stage(self, slot: int, begin: int, end: int) -> None:
        self.pinned[slot][: end - begin].copy_(self.pool[begin:end])

    def copy(self, slot: int, begin: int, end: int) -> torch.cuda.Event:
        rows = end - begin
        source = self.pinned[slot][:rows] if self.staged else self.pool[begin:end]
        with torch.cuda.stream(self.streams[COPIES]):
            self.buffers[slot][:rows].copy_(source, non_blocking=True)
        return self._mark(COPIES)

    def search(self, slot: int, begin: int, end: int) -> torch.cuda.Event:
        queries, k, exclude, out, tuning = self.request
        part = self.buffers[slot][: end - begin]
        topk_cuda.search(queries, part, k, exclude, out, tuning=tuning, first_row=begin, resume=begin > 0)
        return self._mark(SEARCHES)

    def wait(self, lane: str, mark: torch.cuda.Event) -> None:
        self.streams[lane].wait_event(mark)

    def finish(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def _mark(self, lane: str) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # a waiting host leaves its core to the copy of the next part
        event.record(self.streams[lane])
        return event
