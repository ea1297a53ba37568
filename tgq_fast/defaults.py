"""What a caller may have changed for the whole process or thread, and what the package relies on meanwhile."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

__all__ = ["Shared", "own_randomness", "plain_defaults", "single_precision"]

K = TypeVar("K")
V = TypeVar("V")


@dataclass
class _Open(Generic[V]):
    stack: ExitStack
    value: V
    holders: int = 0


class Shared(Generic[K, V]):
    """A change that several threads may need at a time: the first one makes it, the last one undoes it.

    Args:
        make: key → context manager of the change, such as another mode of a module.
        held: where open ones are kept by key; a WeakKeyDictionary for keys that are objects of the caller.
    """

    def __init__(
        self, make: Callable[[K], AbstractContextManager[V]], held: MutableMapping[K, _Open[V]] | None = None
    ) -> None:
        self._make, self._lock = make, threading.Lock()
        self._held: MutableMapping[K, _Open[V]] = {} if held is None else held
        if hasattr(os, "register_at_fork"):  # a child must not wait for a thread that it does not have
            os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, key: K) -> Iterator[V]:
        """The change of a key, made where it is not made yet; yields what its context manager did."""
        with self._lock:
            change = self._held.get(key)
            if change is None:
                stack = ExitStack()
                change = self._held[key] = _Open(stack, stack.enter_context(self._make(key)))
            change.holders += 1
        try:
            yield change.value
        finally:
            with self._lock:
                change.holders -= 1
                if not change.holders:
                    del self._held[key]
                    change.stack.close()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    caller = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(caller)


_shared_dtype: Shared[torch.dtype, None] = Shared(_default_dtype)  # one for the whole process, whatever the thread


def single_precision() -> AbstractContextManager[None]:
    """Modules made within are fp32 whatever the caller's default dtype."""
    return _shared_dtype(torch.float32)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Within, new tensors are fp32 on the CPU unless told otherwise, and products have the dtype of their factors:
    whatever the caller's default dtype, default device and autocast are.
    """
    with ExitStack() as stack:
        stack.enter_context(single_precision())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def own_randomness() -> Iterator[None]:
    """Whatever is seeded and drawn within, the caller's random numbers of Python, NumPy and torch go on as if nothing
    had been.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
