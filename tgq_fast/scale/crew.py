"""What workers do and how they are spoken to, whatever they are: one task each at a time, and an answer or a loss.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tgq_fast.errors import TGQError

__all__ = ["Crew", "Job", "Lost", "Worker"]


class Job(Protocol):
    """What every task of a run has in common; it is sent to each worker once."""

    def begin(self) -> Callable[[Any], Any]:
        """What turns a task into its answer, on the worker's side."""
        ...


@dataclass(frozen=True)
class Lost:
    """A task came to no end: its worker is gone, or what it raised is no answer."""

    reason: str


class Crew(Protocol):
    """Workers, numbered from 0."""

    count: int

    def start(self, job: Job) -> None:
        """Before the first task; workers may start later."""

    def give(self, worker: int, task: Any) -> None:
        """Hand a task to a worker that has none; one that was lost is replaced."""

    def answer(self, seconds: float | None = None) -> tuple[int, Any] | None:
        """Wait for any worker that has a task: its number, and the answer, a typed error or :class:`Lost`; None where
        none has come within `seconds`. WorkerError where workers do not start."""
        ...

    def stop(self) -> None:
        """End all workers, whatever they are at; :meth:`start` begins anew."""

    def close(self) -> None:
        """End all workers for good."""


class Worker:
    """The working side, whatever the job is."""

    def __init__(self, job: Job) -> None:
        try:
            self._do = job.begin()
        except TGQError as error:  # to be told, not tried again
            refusal = error
            self._do = lambda task: refusal

    def ready(self) -> bool:
        """That it has started."""
        return True

    def do(self, task: Any) -> Any:
        """The answer; a typed error ends the run, any other is a failed attempt."""
        try:
            return self._do(task)
        except TGQError as error:
            return error
        except Exception as error:
            return Lost(f"{type(error).__name__}: {error}")
