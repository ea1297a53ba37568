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

__all__ = ["Shared", "exact_products", "own_randomness", "plain_defaults", "plain_tensors", "single_precision"]

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


class _ExactProducts:
    """Holds the process-wide settings that let torch multiply fp32 numbers as TF32 or bf16 at exact fp32.

    Every entry looks again, as the caller may set them at any time; the last one to leave gives back what was found,
    where nobody has changed it since. A part whose value is only its parent's (all of oneDNN's, all backends') is not
    set itself, so that it follows its parent afterwards, too.
    """

    # torch.backends has no name that writes oneDNN's parent, and the older name for products (float32_matmul_precision)
    # cannot be read while one of these has another value than that stands for.
    _PARENTS = (("generic", "all"), ("mkldnn", "all"), ("cuda", "all"))
    _PARTS = (("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"), ("cuda", "matmul"))
    _LOW = ("tf32", "bf16")

    def __init__(self) -> None:
        self._lock, self._holders = threading.Lock(), 0
        self._found: dict[tuple[str, str], str] = {}
        self._older: str | None = None
        self._onednn_off = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._holders += 1
            self._hold()
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._give_back()

    def _hold(self) -> None:
        if torch.backends.mkldnn.is_available() and not torch._C._get_mkldnn_enabled():
            torch._C._set_mkldnn_enabled(True)
            self._onednn_off = True
        if not any(_precision(part) in self._LOW for part in self._PARTS):
            return
        for part in (*self._PARENTS, *self._PARTS):
            if (value := _precision(part)) in self._LOW:
                self._found[part] = value
                torch._C._set_fp32_precision_setter(*part, "ieee")
        if (older := torch.get_float32_matmul_precision()) != "highest":
            self._older = older
            torch.set_float32_matmul_precision("highest")

    def _give_back(self) -> None:
        untouched = {part: value for part, value in self._found.items() if _precision(part) == "ieee"}
        if self._older is not None and all(_precision(part) == "ieee" for part in self._PARTS if part[1] == "matmul"):
            torch.set_float32_matmul_precision(self._older)  # sets the parts for products, too
        for part, value in untouched.items():
            torch._C._set_fp32_precision_setter(*part, value)
        if self._onednn_off:
            torch._C._set_mkldnn_enabled(False)
        self._found, self._older, self._onednn_off = {}, None, False


def _precision(part: tuple[str, str]) -> str:
    return torch._C._get_fp32_precision_getter(*part)


exact_products = _ExactProducts()
"""Within, fp32 products are fp32 in oneDNN and cuBLAS, whatever the caller allows; for any number of threads."""


@contextmanager
def plain_tensors() -> Iterator[None]:
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
def plain_defaults() -> Iterator[None]:
    """:func:`plain_tensors` and :data:`exact_products`: what is computed within does not hang on the caller's settings.

    Of a GPU, cuDNN's convolutions stay the caller's (`torch.backends.cudnn.allow_tf32`).
    """
    with plain_tensors(), exact_products():
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
