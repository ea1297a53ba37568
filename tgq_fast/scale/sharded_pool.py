"""A pool whose shards are held by several processes, or by actors of a cluster: exact answers of the whole pool.

Holders are the workers of a crew. Each has a stretch of the shards in its memory maps, from the same folder as the
process that asks, and answers for those alone; what they answer is merged as the parts of one process are.

Source: ours.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError, PoolError, TGQError, WorkerError
from tgq_fast.pool.files import PoolFiles
from tgq_fast.pool.item_pool import ItemPool, PoolHits
from tgq_fast.pool.manifest import Manifest
from tgq_fast.pool.pins import Pin
from tgq_fast.pool.reader import PoolReader
from tgq_fast.pool.search import PoolSearch
from tgq_fast.scale.crew import Crew, Lost
from tgq_fast.search.count import Marks
from tgq_fast.search.topk import merge_topk

__all__ = ["HoldJob", "ShardedPool"]

TRIES = 3
"""How often one question is asked of a stretch whose holder is lost with it."""


@dataclass(frozen=True)
class _Question:
    """For one holder: a method of :class:`PoolSearch`, its arguments, and the shards that it is asked about."""

    method: str
    shards: range
    given: dict[str, Any]


@dataclass(frozen=True)
class HoldJob:
    """Opens one version of a pool for the stretches of shards that questions name."""

    path: str
    manifest: Manifest
    verify: bool
    torch_threads: int

    def begin(self) -> Callable[[_Question], Any]:
        """See :class:`tgq_fast.scale.crew.Job`."""
        torch.set_num_threads(self.torch_threads)
        path = Path(self.path)
        if not path.is_dir():
            raise PoolError(f"{path}: not there on this machine; every holder needs the pool under the same path")
        files = PoolFiles(path, self.manifest.dims, getattr(torch, self.manifest.dtype), verify=self.verify)
        search = PoolSearch(PoolReader(files, self.manifest, Pin(path, self.manifest.version)))

        def answer(asked: _Question) -> Any:
            return getattr(search, asked.method)(shards=asked.shards, **asked.given)

        return answer


class ShardedPool:
    """Searches and counts over a pool that several holders share; each answer is bit for bit that of one process.

    It shows the version of the pool that it was opened with. Use it in a `with` block, from any number of threads: they
    ask one after another. A holder that is lost is started again from disk and asked again.

    Args:
        path: the pool, which each holder must find under the same path.
        crew: the holders: :class:`~tgq_fast.scale.ProcessCrew` or :func:`~tgq_fast.scale.ray_crew`; closed with this.
        seconds: for one question; holders that are started again meanwhile included.
        verify: check the SHA-256 of each file when it is first read.

    Raises:
        PoolError: the folder is no pool, or damaged.
    """

    def __init__(self, path: str | Path, crew: Crew, *, seconds: float = 300, verify: bool = True) -> None:
        if not seconds > 0:
            raise ArgumentError("seconds", seconds, "a time limit above 0")
        self.path, self.crew, self.seconds = Path(path), crew, seconds
        try:
            self._pool = ItemPool.open(path, verify=verify)
        except BaseException:
            crew.close()
            raise
        threads = max(1, torch.get_num_threads() // crew.count)
        self._job = HoldJob(os.path.abspath(path), self._pool.manifest, verify, threads)
        self._lock = threading.Lock()
        self._started = False
        own = self._pool._state[1]
        stretches = [(holder, own.shards_of(holder, crew.count)) for holder in range(crew.count)]
        self._stretches = {holder: shards for holder, shards in stretches if len(shards)}

    def close(self) -> None:
        """End the holders."""
        self.crew.close()
        self._pool.close()

    def __enter__(self) -> ShardedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def dims(self) -> int:
        """D."""
        return self._pool.dims

    @property
    def manifest(self) -> Manifest:
        """The version of the pool that is shown."""
        return self._pool.manifest

    def rows(self, ids: Sequence[str], *, missing: Any = "raise") -> np.ndarray:
        """See :meth:`tgq_fast.pool.ItemPool.rows`; this process looks ids up."""
        return self._pool.rows(ids, missing=missing)

    def names(self, rows: np.ndarray) -> list[str | None]:
        """See :meth:`tgq_fast.pool.ItemPool.names`."""
        return self._pool.names(rows)

    def take(self, rows: np.ndarray) -> Tensor:
        """See :meth:`tgq_fast.pool.ItemPool.take`."""
        return self._pool.take(rows)

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        *,
        exclude_ids: Sequence[str | None] | Sequence[Sequence[str]] | None = None,
        where: np.ndarray | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PoolHits:
        """The answer of :meth:`tgq_fast.pool.ItemPool.search`, with its arguments and errors.

        Args:
            progress: called with (rows searched, rows in the pool) whenever a holder has answered.

        Raises:
            WorkerError: a holder that was lost three times, does not start, or has not answered in time; names it.
        """
        reader, own = self._pool._state
        wanted, size, excluded, allowed = own.checked(queries, k, exclude_ids, where)
        given = {"queries": wanted.clone(), "k": size, "excluded": excluded, "allowed": allowed}  # pickled alone
        found = self._ask("best_rows", given, progress)
        best = merge_topk(found, size) if found else own.best_rows(wanted, size, None)
        return PoolHits(best.scores, best.indices, reader.ids_at(best.indices))

    def count_before(
        self, queries: Tensor, marks: Marks, *, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """[M] int64: how many rows of the pool come before each mark, as :meth:`tgq_fast.pool.ItemPool.count_before`
        counts them. Raises as :meth:`search` does."""
        found = self._ask(
            "count_before", {"queries": queries.clone(), "marks": Marks(*(part.clone() for part in marks))}, progress
        )
        return torch.stack([torch.zeros(len(marks.rows), dtype=torch.int64, device="cpu"), *found]).sum(dim=0)

    def _ask(self, method: str, given: dict[str, Any], progress: Callable[[int, int], None] | None) -> list[Any]:
        """The answers of all holders that hold something, in their order."""
        questions = {holder: _Question(method, shards, given) for holder, shards in self._stretches.items()}
        with self._lock:
            try:
                return self._answers(questions, progress)
            except BaseException:  # Ctrl-C too: what is on its way is no answer to the next question
                self.crew.stop()
                self._started = False
                raise

    def _answers(self, questions: dict[int, _Question], progress: Callable[[int, int], None] | None) -> list[Any]:
        if not self._started:
            self.crew.start(self._job)
            self._started = True
        due = time.monotonic() + self.seconds
        answers: dict[int, Any] = {}
        failed = dict.fromkeys(questions, 0)
        for holder, question in questions.items():
            self.crew.give(holder, question)
        while len(answers) < len(questions):
            told = self.crew.answer(max(0.0, due - time.monotonic()))
            if told is None:
                late = ", ".join(self._named(holder) for holder in questions if holder not in answers)
                raise WorkerError(f"{late}: no answer within {self.seconds:g} seconds")
            holder, answer = told
            if isinstance(answer, TGQError):
                raise answer
            if isinstance(answer, Lost):
                failed[holder] += 1
                if failed[holder] >= TRIES:
                    raise WorkerError(f"{self._named(holder)}: lost {TRIES} times with one question ({answer.reason})")
                self.crew.give(holder, questions[holder])
                continue
            answers[holder] = answer
            if progress is not None:
                progress(sum(self._rows(done) for done in answers), len(self))
        return [answers[holder] for holder in questions]

    def _rows(self, holder: int) -> int:
        starts, shards = self._pool._state[0].starts, self._stretches[holder]
        return int(starts[shards.stop] - starts[shards.start])

    def _named(self, holder: int) -> str:
        shards = self._stretches[holder]
        return f"holder {holder} of {self.crew.count} (shards {shards.start} to {shards.stop - 1} of {self.path})"
