"""Another checkout of this package, with its own compiled extension, as a variant: two builds compared in one run.

It runs in a process of its own on copies of the same pool and queries, and times its calls itself, so that no message
between the processes is counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import UnavailableError
from benchmarks.environment import commit

_WORKER = Path(__file__).with_name("other_build_worker.py")


class OtherBuild:
    """`topk` of another checkout.

    Args:
        checkout: folder with a `tgq_fast` whose extension is built.
        pool: [N, D].
        queries: sets [Q, D]; the pool itself for a self-join.
        k: rows per query.
        threads: of its search and of torch.
        codes: whether it stores codes of the pool (or what it had before them).

    Attributes:
        facts: commits of its sources and of its extension.

    Raises:
        UnavailableError: nothing is built there, or the process ended.
    """

    def __init__(
        self, checkout: Path, pool: Tensor, queries: Sequence[Tensor], k: int, threads: int, codes: bool
    ) -> None:
        checkout = checkout.resolve()
        if not list((checkout / "tgq_fast").glob("_C*.so")):
            raise UnavailableError(f"{checkout} has no tgq_fast with a compiled extension")
        self._folder = tempfile.TemporaryDirectory(prefix="tgq-other-build-")
        folder = Path(self._folder.name)
        same = queries[0] is pool
        (folder / "dtype").write_text(str(pool.dtype).removeprefix("torch."))
        _save(folder / "pool.npy", pool)
        if not same:
            _save(folder / "queries.npy", torch.stack(list(queries)))
        np.save(folder / "found.npy", np.full((len(queries[0]), k), -1, np.int64))
        command = [sys.executable, "-c", _WORKER.read_text(), str(folder), str(int(same)), str(k), str(threads)]
        self._process = subprocess.Popen(
            [*command, str(int(codes))],
            cwd=checkout,  # first on the path of `-c`
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        weakref.finalize(self, _end, self._process, self._folder)
        ready, built, where = self._answer().split(maxsplit=2)
        if ready != "ready" or Path(where) != checkout / "tgq_fast":
            raise UnavailableError(f"another package than that of {checkout} was loaded: {where}")
        (folder / "pool.npy").unlink()
        self._found = np.load(folder / "found.npy", mmap_mode="r")
        self.facts = f"sources {commit(checkout)}, extension {built}"

    def __call__(self, i: int) -> Tensor:
        """Rows [Q, k] int64 for query set `i`."""
        self.timed(i, 1)
        return torch.from_numpy(self._found.copy())

    def timed(self, first: int, count: int) -> float:
        """Seconds that `count` calls took, on query sets from `first` on."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{first} {count}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UnavailableError("the process of the other build ended") from None
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise UnavailableError(f"the process of the other build ended ({self._process.wait()})")
        return line


def _save(path: Path, tensor: Tensor) -> None:
    plain = tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)  # numpy has no bfloat16
    np.save(path, plain.numpy())


def _end(process: subprocess.Popen[str], folder: tempfile.TemporaryDirectory[str]) -> None:
    for stream in (process.stdin, process.stdout):  # it ends when it reads the end of its input
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    process.wait()
    folder.cleanup()
