"""What workers do and how they are spoken to, whatever they are: one task each at a time, and an answer or a loss.

Source: ours.
"""

from __future__ import annotations

import io
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tgq_fast.data import Catalog
from tgq_fast.errors import TGQError
from tgq_fast.pool.embed_parts import EmbeddedPart, Encoder, PartEncoder, PartOptions

__all__ = ["Crew", "Job", "Lost", "Task", "Worker", "pack_job"]


@dataclass(frozen=True)
class Job:
    """What every task of a run has in common.

    Attributes:
        model: of :func:`pack_job`.
        options: as for a single process.
        torch_threads: of each worker.
    """

    model: bytes
    options: PartOptions
    torch_threads: int


@dataclass(frozen=True)
class Task:
    """Items to embed.

    Attributes:
        catalog: of these items alone.
        refused: items that are left out unseen, by id: (reason, detail).
    """

    catalog: Catalog
    refused: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Lost:
    """A task came to no end: its worker is gone, or what it raised is no answer."""

    reason: str


Answer = EmbeddedPart | Lost | TGQError


class Crew(Protocol):
    """Workers, numbered from 0."""

    count: int

    def start(self, job: Job) -> None:
        """Before the first task; workers may start later."""

    def give(self, worker: int, task: Task) -> None:
        """Hand a task to a worker that has none; one that was lost is replaced."""

    def answer(self) -> tuple[int, Answer]:
        """Wait for any worker that has a task. WorkerError where workers do not start."""
        ...

    def close(self) -> None:
        """End all workers."""


def pack_job(model: Encoder, options: PartOptions, torch_threads: int) -> Job:
    """A job, with the model as bytes that only a worker of this run reads; frozen towers are loaded there by name."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return Job(buffer.getvalue(), options, torch_threads)


class Worker:
    """The working side: holds the model and embeds parts with the code of a single process."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.torch_threads)
        self.model: Any = torch.load(io.BytesIO(job.model), map_location="cpu", weights_only=False)
        if torch.cuda.is_available():
            torch.nn.Module.to(self.model, "cuda")
        self.options = job.options
        self._run = getattr(self.model, "encoding", nullcontext)()
        self._run.__enter__()  # packs weights once for all tasks; never closed

    def ready(self) -> bool:
        """That it has started."""
        return True

    def embed(self, task: Task) -> Answer:
        """The embedded part; a typed error ends the run, any other is a failed attempt."""
        try:
            encoder = PartEncoder(task.catalog, self.model, self.options, refused=task.refused)
            (part,) = encoder.parts([range(len(task.catalog))])
            return part
        except TGQError as error:
            return error
        except Exception as error:
            return Lost(f"{type(error).__name__}: {error}")
