"""Parts of a batch side by side: each on one thread, instead of one after the other on all of them.

Small convolutions share out badly, and threads that wait for one another at each of them wait long where something else
runs on the machine. The bits are those of one thread, however many there are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

T = TypeVar("T")
R = TypeVar("R")

_pools: dict[int, ThreadPoolExecutor] = {}
_opening = threading.Lock()


def side_by_side(run: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """`run` of each part, in order, on as many threads as PyTorch would use for one of them in this thread.

    Within, PyTorch computes on one thread, without autograd and autocast, whatever the caller's state is.

    Raises:
        What `run` raises for the first part that fails.
    """
    inference = torch.is_inference_mode_enabled()

    def alone(part: T) -> R:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return run(part)

    threads = torch.get_num_threads()
    if threads == 1:
        return [alone(part) for part in parts]
    return list(_pool(threads).map(alone, parts))


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads of which each computes alone; they live as long as the process."""
    with _opening:
        if threads not in _pools:
            started = threading.Barrier(threads)
            pool = ThreadPoolExecutor(threads, thread_name_prefix="tgq-part", initializer=_alone)
            list(pool.map(lambda _: started.wait(), range(threads)))
            # A thread's number is its own, but also what threads begin with that start later.
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]


def _alone() -> None:
    torch.get_num_threads()  # the first question sets the process's number: it must not come later
    torch.set_num_threads(1)


def _forget() -> None:
    """A forked child has none of its parent's threads, and perhaps a lock that one of them held."""
    global _opening
    _opening = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
