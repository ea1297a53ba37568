"""What long steps tell whoever watches them: notes, and how far they are. The library says nothing by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Advance", "Watch", "follows"]


class Advance(Protocol):
    """Progress callback: how much is done, of how much where that is known, and of what where that changes."""

    def __call__(self, done: int, total: int | None = None, description: str | None = None, /) -> None: ...


class Watch:
    """Is told, and does nothing; the command line's writes to the terminal."""

    def note(self, message: str) -> None:
        """One line for the person watching."""

    def progress(self, description: str) -> AbstractContextManager[Advance]:
        """Around a long step; the callback is called with (done, total, of what)."""
        return _unseen()


@contextmanager
def _unseen() -> Iterator[Advance]:
    yield lambda done, total=None, description=None, /: None


SILENT = Watch()


def follows() -> bool:
    """Whether this is a rank above 0 of `torchrun` or `accelerate launch`: rank 0 says and writes the same."""
    return os.environ.get("RANK", "0") not in ("", "0") and int(os.environ.get("WORLD_SIZE", "1")) > 1
