"""Who does what next: hands parts to workers, counts attempts, finds items that end their worker, gives parts in order.

Source: ours.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError, PoolError, TGQError, WorkerError
from tgq_fast.io.files import make_folder
from tgq_fast.pool.embed_parts import EmbeddedPart, Encoder, PartOptions
from tgq_fast.scale.attempts import Attempts, Span
from tgq_fast.scale.crew import Crew, Lost
from tgq_fast.scale.embed_job import EmbedJob, Task
from tgq_fast.scale.parts import BATCHES_PER_PART, Part, cut, is_current, part_path, read_part, write_part

__all__ = ["PartsEngine"]

logger = logging.getLogger(__name__)

TRIES = 3
"""Attempts at a part before its items are looked at, and at an item before it is refused."""
_MOST_REFUSED = 8  # of one part: where more items end their workers, the workers are at fault
REASON = "ends_worker"


@dataclass
class _Search:
    """For the items of a part that end their worker: ranges to try, the last one first.

    Attributes:
        ranges: (first, stop) of the part's rows.
        found: how many items were refused.
    """

    ranges: list[tuple[int, int]]
    found: int = 0


@dataclass
class _State:
    """A part that is not finished.

    Attributes:
        search: for items that end their worker, while it goes on.
        searched: whether a search found none.
        reason: how the last attempt ended.
        tried: (first, stop) of the part's rows that a worker has.
    """

    part: Part
    search: _Search | None = None
    searched: bool = False
    reason: str = ""
    tried: tuple[int, int] = (0, 0)


class PartsEngine:
    """An engine of :func:`tgq_fast.embed_catalog` over several workers.

    Finished parts, the number of attempts at each and the refused items are in `folder` until they are committed, so
    that a run whose driver was lost goes on with them.

    Args:
        crew: the workers.
        folder: of this run; made, and removed when all is committed.
        batches: per part.
    """

    def __init__(self, crew: Crew, folder: Path, *, batches: int = BATCHES_PER_PART) -> None:
        if batches < 1:
            raise ArgumentError("batches", batches, "at least 1 batch per part")
        self.crew, self.folder, self.batches = crew, folder, batches

    def __call__(
        self,
        catalog: Catalog,
        model: Encoder,
        stretches: Sequence[Sequence[int]],
        options: PartOptions,
        progress: Callable[[int], None],
    ) -> Generator[EmbeddedPart]:
        """See :class:`tgq_fast.pool.embed_parts.Engine`."""
        if not stretches:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise PoolError(f"{self.folder}: in the way; finished parts are kept there")
        make_folder(self.folder)
        attempts = Attempts(self.folder / "attempts.jsonl")
        threads = max(1, options.threads // self.crew.count)
        job = EmbedJob.of(model, replace(options, threads=threads), max(1, torch.get_num_threads() // self.crew.count))
        run = _Run(catalog, options, cut(catalog, stretches, options, self.batches), self.folder, attempts, progress)
        try:
            run.take_up()
            if run.todo:
                self.crew.start(job)
            for number in range(len(stretches)):
                while run.missing(number):
                    self._step(run)
                yield run.stretch(number)
                run.forget(number - 1)  # whoever asks for the next has committed the one before
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self.crew.close()

    def _step(self, run: _Run) -> None:
        """Give every idle worker something to do, and take one answer."""
        for worker in range(self.crew.count):
            if worker not in run.busy and (given := run.next_task()) is not None:
                run.busy[worker] = given
                self.crew.give(worker, run.task(given))
        told = self.crew.answer()
        assert told is not None
        worker, answer = told
        state = run.busy.pop(worker)
        if isinstance(answer, TGQError):
            raise answer
        if isinstance(answer, Lost):
            run.lost(state, answer.reason)
        else:
            run.done(state, answer)


class _Run:
    """The parts of one run and where each stands."""

    def __init__(
        self,
        catalog: Catalog,
        options: PartOptions,
        parts: list[Part],
        folder: Path,
        attempts: Attempts,
        progress: Callable[[int], None],
    ) -> None:
        self.catalog, self.options, self.folder = catalog, options, folder
        self.attempts, self.progress = attempts, progress
        self.parts = parts
        self.finished: set[str] = set()
        self.todo: deque[_State] = deque()
        self.busy: dict[int, _State] = {}
        self._open = [0] * (max((part.stretch for part in parts), default=-1) + 1)
        for part in parts:
            self._open[part.stretch] += 1
            part.refused.update(attempts.refused.get(part.key, {}))

    def take_up(self) -> None:
        """Keep the parts that an earlier driver finished, if their pictures are still the same."""
        for part in self.parts:
            done = read_part(self.folder, part, self.options.width)
            if done is not None and is_current(self.catalog, part, done, self.options):
                self._finish(part)
            else:
                self.todo.append(_State(part))

    def missing(self, stretch: int) -> bool:
        """Whether a part of it is not finished."""
        return self._open[stretch] > 0

    def stretch(self, number: int) -> EmbeddedPart:
        """A finished stretch, from its files."""
        found = [read_part(self.folder, part, self.options.width) for part in self.parts if part.stretch == number]
        whole = [part for part in found if part is not None]
        if len(whole) < len(found):
            raise PoolError(f"{self.folder}: a finished part is gone or damaged; run the same command again")
        return EmbeddedPart.join(whole)

    def forget(self, stretch: int) -> None:
        """Remove the files of a stretch."""
        for part in self.parts:
            if part.stretch == stretch:
                part_path(self.folder, part).unlink(missing_ok=True)

    def next_task(self) -> _State | None:
        """What to try next; its attempt is on disk when this returns."""
        if not self.todo:
            return None
        state = self.todo.popleft()
        whole = (0, len(state.part.rows))
        if state.search is None and self.attempts.failed(self._span(state, whole)) >= TRIES:
            self._begin_search(state)
        state.tried = whole if state.search is None else state.search.ranges[-1]
        self.attempts.begin(self._span(state, state.tried))
        return state

    def task(self, state: _State) -> Task:
        """For a worker."""
        first, stop = state.tried
        items = [self.catalog.items[row] for row in state.part.rows[first:stop]]
        return Task(self.catalog.part(items, alone=True), dict(state.part.refused))

    def done(self, state: _State, answer: EmbeddedPart) -> None:
        """A worker embedded what it was given."""
        self.attempts.end(self._span(state, state.tried))  # first: a disk that is full is no fault of the part
        if state.search is None:
            write_part(self.folder, state.part, answer)
            self._finish(state.part)
            return
        state.search.ranges.pop()
        self._go_on(state)

    def lost(self, state: _State, reason: str) -> None:
        """A worker did not come back from it."""
        state.reason = reason
        first, stop = state.tried
        name = self.catalog.items[state.part.rows[first]].id
        logger.warning("worker lost with %d items from %r on: %s", stop - first, name, reason)
        if state.search is not None:
            if stop - first > 1:
                middle = (first + stop) // 2
                state.search.ranges[-1:] = [(middle, stop), (first, middle)]
            elif self.attempts.failed(self._span(state, state.tried)) >= TRIES:
                state.search.ranges.pop()
                self._refuse(state, first)
        self._go_on(state)

    def _begin_search(self, state: _State) -> None:
        middle = len(state.part.rows) // 2
        whole = [(middle, len(state.part.rows)), (0, middle)] if middle else [(0, 1)]
        state.search = _Search(whole)
        logger.warning("part %s ended %d workers; trying its items", state.part.key, TRIES)

    def _go_on(self, state: _State) -> None:
        search = state.search
        if search is not None and not search.ranges:
            if not search.found and state.searched:
                raise WorkerError(
                    f"{len(state.part.rows)} items from {self.catalog.items[state.part.rows[0]].id!r} on end their "
                    f"worker together but not alone ({state.reason}); is there enough memory for their batch? A "
                    "smaller batch_size or fewer workers may help"
                )
            state.searched, state.search = not search.found, None
            self.attempts.end(self._span(state, (0, len(state.part.rows))))  # new chances
        self.todo.appendleft(state)  # the first stretches first

    def _refuse(self, state: _State, at: int) -> None:
        item = self.catalog.items[state.part.rows[at]]
        detail = f"ended its worker {TRIES} times ({state.reason})"
        if self.options.on_error == "raise":
            raise WorkerError(f"item {item.id}: {detail}; on_error='skip' leaves it out and lists it")
        assert state.search is not None
        state.search.found += 1
        if len(state.part.refused) >= _MOST_REFUSED or item.id in state.part.refused:
            raise WorkerError(f"item {item.id} and items near it: {detail}; the workers are at fault")
        self.attempts.refuse(state.part.key, item.id, REASON, detail)
        state.part.refused[item.id] = (REASON, detail)

    def _finish(self, part: Part) -> None:
        self._open[part.stretch] -= 1
        self.progress(len(part.rows))

    def _span(self, state: _State, rows: tuple[int, int]) -> Span:
        return state.part.key, *rows
