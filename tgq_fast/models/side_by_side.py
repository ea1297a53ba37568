"""Parts of a batch side by side: each on one thread, instead of one after the other on all of them.

Small convolutions share out badly, and threads that wait for one another at each of them wait long where something else
runs on the machine. The bits are those of one thread, however many there are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["side_by_side", "traced"]

T = TypeVar("T")
R = TypeVar("R")

_pools: dict[int, ThreadPoolExecutor] = {}
_opening = threading.Lock()


def side_by_side(run: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """`run` of each part, in order, on as many threads as PyTorch would use for one of them in this thread.

    Within, PyTorch computes on one thread, without autograd and autocast, whatever the caller's state is. Where what
    looks on at this thread alone (:func:`traced`) must see every operation, and where the interpreter ends and gives no
    thread work any more, they run here, one after the other.

    Raises:
        What `run` raises for the first part that fails.
    """
    if traced():
        return _in_turn(run, parts)
    inference, threads = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def alone(part: T) -> R:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return run(part)

    waiting = None if threads == 1 else _start(alone, parts, threads)
    if waiting is None:
        return _in_turn(run, parts)
    try:
        return [future.result() for future in waiting]
    finally:
        for future in waiting:
            future.cancel()


def traced() -> bool:
    """Whether this thread's operations are traced, exported, compiled, counted or done on tensors without values."""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]
    )


def _in_turn(run: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return [run(part) for part in parts]


def _start(run: Callable[[T], R], parts: Sequence[T], threads: int) -> list[Future[R]] | None:
    """None where the interpreter, which ends before its last threads do, starts nothing any more."""
    waiting: list[Future[R]] = []
    try:
        pool = _pool(threads)
        for part in parts:
            waiting.append(pool.submit(run, part))
    except RuntimeError:
        for future in waiting:
            future.cancel()
        return None
    return waiting


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads of which each computes alone; they live as long as the process."""
    with _opening:
        if threads not in _pools:
            started = threading.Barrier(threads)
            pool = ThreadPoolExecutor(threads, thread_name_prefix="tgq-part", initializer=_alone)
            try:
                list(pool.map(lambda _: started.wait(), range(threads)))
            except BaseException:  # no thread more, or Ctrl-C: those that wait would keep the process from ending
                started.abort()
                pool.shutdown(wait=False)
                raise
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
