"""Typed errors: each says what was given, what was expected and what to do."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

__all__ = [
    "ArgumentError",
    "BackendError",
    "CatalogError",
    "CheckpointError",
    "DependencyError",
    "DistributedError",
    "ImageError",
    "NonFiniteError",
    "PoolError",
    "StorageError",
    "TGQError",
    "WorkerError",
]


class TGQError(Exception):
    """Base class of every error that tgq_fast raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # From worker processes: by its attributes, as the arguments of most are not what the message is.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[TGQError], args: tuple[Any, ...], state: dict[str, Any]) -> TGQError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ArgumentError(TGQError, ValueError):
    """A function argument is wrong.

    Args:
        argument: name of the argument.
        given: the value (or its dtype / shape) that was passed.
        expected: what the function accepts.
        hint: what to do about it, optional.
    """

    def __init__(self, argument: str, given: object, expected: str, hint: str = "") -> None:
        self.argument, self.given, self.expected, self.hint = argument, given, expected, hint
        message = f"{argument}: got {given}, expected {expected}"
        super().__init__(f"{message}. {hint}" if hint else message)


class CatalogError(TGQError, ValueError):
    """A catalogue cannot be read; `problems` lists `row N: …` lines."""

    def __init__(self, path: str | PurePath, problems: Sequence[str], hint: str = "") -> None:
        self.path, self.problems = str(path), tuple(problems)
        shown = "\n  ".join(self.problems[:10])
        more = f"\n  … and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
        tail = f"\n{hint}" if hint else ""
        super().__init__(f"catalogue {path}: {len(self.problems)} problem(s)\n  {shown}{more}{tail}")


class ImageError(TGQError):
    """One product picture cannot be used; carries the item id, the path and a reason code.

    `lasting` is False where the moment or the machine decided it (no memory, no permission, a Pillow without the codec)
    and not the bytes of the picture: such a verdict is never kept.
    """

    def __init__(self, item_id: str, path: str | Path, reason: str, detail: str = "", *, lasting: bool = True) -> None:
        self.item_id, self.path, self.reason, self.detail = item_id, str(path), reason, detail
        self.lasting = lasting
        super().__init__(f"item {item_id}: image {path}: {reason}" + (f" ({detail})" if detail else ""))


class CheckpointError(TGQError):
    """A checkpoint or run directory is missing, corrupt, foreign or incompatible."""


class PoolError(TGQError):
    """An item pool is missing, corrupt, foreign, truncated or incompatible."""


class StorageError(TGQError, OSError):
    """A file or folder cannot be written: disk full or read-only, no permission, a folder where a file should be.

    Args:
        path: what was to be written.
        cause: what the operating system said; its errno is kept.
    """

    def __init__(self, path: str | Path, cause: OSError) -> None:
        self.path, self.cause = str(path), cause
        hints = {
            errno.ENOSPC: "free some space and run the same command again",
            errno.EDQUOT: "free some of your quota and run the same command again",
            errno.EROFS: "choose a folder that can be written to",
            errno.EACCES: "choose a folder that you may write to",
            errno.EPERM: "choose a folder that you may write to",
            errno.EISDIR: "name a file, not a folder",
            errno.ENOTDIR: "a part of the path is a file; choose another path",
            errno.EEXIST: "a file is in the way; choose another path",
            errno.ELOOP: "a link is in the way; choose another path",
        }
        hint = hints.get(cause.errno or 0, "choose another place or mend this one")
        super().__init__(cause.errno, f"{path}: cannot be written: {cause.strerror or cause}; {hint}")

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type, tuple[str, OSError]]:
        return type(self), (self.path, self.cause)


class NonFiniteError(TGQError, ValueError):
    """NaN or infinity where finite numbers are required; `ids` names the rows (at most 20)."""

    def __init__(self, what: str, ids: Sequence[object], count: int) -> None:
        self.ids, self.count = tuple(ids), count
        shown = ", ".join(str(i) for i in ids)
        super().__init__(f"{what}: {count} row(s) hold NaN or infinity: {shown}")


class DependencyError(TGQError, ImportError):
    """An optional package is missing; the message says which extra installs it."""


class DistributedError(TGQError, RuntimeError):
    """Processes that work together have lost one of them."""


class WorkerError(TGQError, RuntimeError):
    """Workers that embed do not start, or end again and again."""


class BackendError(TGQError, RuntimeError):
    """A forced backend cannot run; `reasons` maps each rejected backend to why."""

    def __init__(self, op: str, backend: str, reasons: Mapping[str, Sequence[str]]) -> None:
        self.op, self.backend = op, backend
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        lines = "; ".join(f"{name}: {', '.join(why)}" for name, why in self.reasons.items())
        super().__init__(f"{op}: backend {backend!r} cannot run here ({lines})")
