"""The folder of a pool: what may lie in it, who may write to it, and a new one's beginning."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.io.files import Hold, hold, make_folder
from tgq_fast.pool.log import MANIFEST_NAME, PoolLog
from tgq_fast.pool.manifest import DTYPES, Manifest
from tgq_fast.pool.pins import PINS_NAME

__all__ = ["LEFTOVER", "acquire", "start"]

LOCK_NAME = ".lock"
_FILE = (
    r"(shard-\d{6,}\.(safetensors|ids\.parquet|index\.safetensors|codes\.safetensors|shadow\.safetensors)"
    r"|commit-\d{8,}\.json|rejects\.jsonl|manifest\.json)"
)
LEFTOVER = re.compile(rf"{_FILE}|\.{_FILE}\.\w+\.tmp")  # a file of a pool, or one that a killed writer left half done


def acquire(path: Path) -> Hold:
    """The writer's lock of a folder; PoolError where another writer has it."""
    if (lock := hold(path / LOCK_NAME)) is None:
        raise PoolError(f"{path}: another process is writing to this pool; wait for it to end")
    return lock


def start(path: Path, wanted: Manifest, *, resume: bool) -> Hold:
    """Make an empty pool in a folder, or with `resume` accept one that is there; returns the writer's lock.

    Raises:
        ArgumentError: dims, dtype or shard_size cannot be.
        PoolError: the folder holds something else, a different pool, or another process writes to it.
    """
    if wanted.dims < 1:
        raise ArgumentError("dims", wanted.dims, "a width of at least 1")
    if wanted.dtype not in DTYPES:
        raise ArgumentError("dtype", repr(wanted.dtype), "one of " + ", ".join(map(repr, DTYPES)))
    if wanted.shard_size < 1:
        raise ArgumentError("shard_size", wanted.shard_size, "at least 1 row per shard")
    make_folder(path)
    if not (path / MANIFEST_NAME).exists():
        own = (LOCK_NAME, PINS_NAME)
        foreign = sorted(name for name in os.listdir(path) if name not in own and not LEFTOVER.fullmatch(name))
        if foreign:
            listed = ", ".join(foreign[:3])
            raise PoolError(f"{path}: holds files that are no pool's ({listed}); choose an empty folder")
    lock = acquire(path)
    try:
        log = PoolLog(path)
        if not (path / MANIFEST_NAME).exists():
            log.start(wanted)
            return lock
        manifest = log.read()
        if not resume:
            raise PoolError(f"{path} already holds a pool of {manifest.rows} items; resume, append, or choose another")
        for name in ("dims", "dtype", "shard_size", "model", "source"):
            old, new = getattr(manifest, name), getattr(wanted, name)
            if old != new:
                raise PoolError(f"{path}: cannot resume, its {name} is {old!r} and this run's is {new!r}")
        return lock
    except BaseException:
        lock.release()
        raise
