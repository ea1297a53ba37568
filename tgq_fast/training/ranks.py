"""The processes that train or evaluate together: who leads, what the leader decides for all, how a lost one is told.

Source: ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from tgq_fast.errors import ArgumentError, DistributedError, TGQError

__all__ = ["Team", "refuse_fsdp"]

T = TypeVar("T")
ANSWER_SECONDS = 300
"""How long a rank may keep the others waiting in a training step before all of them end."""
_PATIENCE = timedelta(days=2)  # while rank 0 computes features; that it has died is noticed at once
_SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "timeout", "broken pipe", "rendezvous")


class Team:
    """The ranks of one job; a single process is a team of one.

    Under `torchrun` or `accelerate launch` the process group is opened here unless it is open already.
    """

    def __init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            with _told("the processes did not find each other"):
                dist.init_process_group(backend, timeout=timedelta(seconds=ANSWER_SECONDS))
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        self._waiting = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None for a single process."""
        return dist.group.WORLD if self.size > 1 else None

    def lead(self, work: Callable[[], T]) -> T:
        """Rank 0 does it; all ranks get its result, or the error that it ended in.

        Raises:
            DistributedError: rank 0 is gone.
        """
        if self.size == 1:
            return work()
        box: list[Any] = [None]
        caught: BaseException | None = None
        if self.leads:
            try:
                box = [(True, work())]
            except BaseException as error:
                caught = error
                told = error if isinstance(error, TGQError) else DistributedError(f"rank 0: {error!r}")
                box = [(False, str(told))]
        with _told("rank 0 is gone"):
            dist.broadcast_object_list(box, src=0, group=self._waiting)
        if caught is not None:
            raise caught
        good, result = box[0]
        if not good:
            raise DistributedError(f"rank 0 ended: {result}")
        return cast(T, result)

    def meet(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with _told("a process is gone"):
                dist.barrier(group=self._waiting)

    def share(self, batch_size: int) -> int:
        """Pairs of each rank, of a batch of so many; 0 where there is none for everybody."""
        return batch_size // self.size

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Errors of the collectives become one that says what happened and what to do."""
        if self.size == 1:
            yield
        else:
            with _told(f"rank {self.rank} of {self.size} waited for a process that stopped or did not answer"):
                yield


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except TGQError:
        raise
    except (RuntimeError, TimeoutError) as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in text.lower() for sign in _SIGNS):
            raise
        first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        hint = "Start all processes again; training goes on from the last checkpoint with resume=True."
        raise DistributedError(f"{what} ({first[:200]}). {hint}") from error


def refuse_fsdp() -> None:
    """ArgumentError where accelerate is told to shard the model of `train`: its frozen towers are no part of the model,
    and what it validates, averages and saves are whole weights."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        raise ArgumentError(
            "accelerate",
            "FSDP",
            "data parallel processes, each with the whole model",
            "in a loop of your own, tgq_fast.training.shard_model shards a model",
        )
