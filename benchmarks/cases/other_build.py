"""Another checkout of this package, with its own compiled extension, as a variant: two builds compared in one run.

It runs in a process of its own on copies of the same pool and queries, and times its calls itself, so that no message
between the processes is counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.checkout_process import CheckoutProcess

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
        self._folder = tempfile.TemporaryDirectory(prefix="tgq-other-build-")
        folder = Path(self._folder.name)
        same = queries[0] is pool
        (folder / "dtype").write_text(str(pool.dtype).removeprefix("torch."))
        _save(folder / "pool.npy", pool)
        if not same:
            _save(folder / "queries.npy", torch.stack(list(queries)))
        np.save(folder / "found.npy", np.full((len(queries[0]), k), -1, np.int64))
        self._other = CheckoutProcess(
            checkout, _WORKER, str(folder), str(int(same)), str(k), str(threads), str(int(codes))
        )
        (folder / "pool.npy").unlink()
        self._found = np.load(folder / "found.npy", mmap_mode="r")
        self.facts = self._other.facts

    def __call__(self, i: int) -> Tensor:
        """Rows [Q, k] int64 for query set `i`."""
        self.timed(i, 1)
        return torch.from_numpy(self._found.copy())

    def timed(self, first: int, count: int) -> float:
        """Seconds that `count` calls took, on query sets from `first` on."""
        return float(self._other.ask(f"{first} {count}"))


def _save(path: Path, tensor: Tensor) -> None:
    plain = tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)  # numpy has no bfloat16
    np.save(path, plain.numpy())
