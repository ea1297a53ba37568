"""Time tile rows on the GPU at hand and write the table of that GPU: the measured counterpart of the shipped tables.

For every kernel and shape class the shipped row and its neighbours (warps, pipeline depth, chunk of the width) are
launched on one representative shape; the fastest that compiles and runs replaces the shipped one. Results are the same
for every row up to rounding: tiles change the order of sums only. The table is rewritten after every class, and an
existing one is extended, so that tuning may be interrupted and taken up again.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.io.files import write_atomic
from tgq_fast.io.json_text import read_json
from tgq_fast.kernels import (
    cross_attention,
    cross_attention_backward,
    cross_attention_fused,
    modulation,
    stream_attention,
    tiling,
)

logger = logging.getLogger("tgq_fast.kernels.tune")

Launch = Callable[[], Any]
Case = tuple[str, dict[str, int], Launch]
Clock = Callable[[Launch, bool], float]
_NEIGHBOURS: dict[str, dict[str, tuple[int, ...]]] = {
    "absorbed": {"num_warps": (4, 8), "num_stages": (2, 3, 4), "BLOCK_C": (32, 64), "BLOCK_O": (32, 64)},
    "fused": {"num_warps": (4, 8), "num_stages": (2, 3, 4), "BLOCK_C": (64, 128), "BLOCK_O": (64, 128)},
    "stream": {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3), "BLOCK_K": (32, 64, 128)},
    "modulation": {"num_warps": (4, 8), "num_stages": (1, 2, 3), "ITEMS": (4, 8, 16), "BLOCK_C": (32, 64, 128)},
}


def cases(device: torch.device, dtype: torch.dtype, batch: int = 256) -> Iterator[Case]:
    """(kernel, its sizes, launch) for every shape class that is worth its own row, the commonest first."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for keys in (256, 768, 64, 128, 384, 512):
        q, x = new(batch, 12, 16, 768), new(batch, keys - keys // 5, 768)
        out, stats = torch.empty_like(q), torch.zeros(batch, 12, 16, device=device)
        sizes = {"keys": keys, "rows": 192}

        yield "absorbed_forward", sizes, partial(cross_attention.forward, q, x, *(None,) * 4, 0.1, out, stats)
        given = q, x, None, None, None, q, stats, stats, 0.1, out
        yield "absorbed_backward_rows", sizes, partial(cross_attention_backward.backward_rows, *given)
    weight = new(768, 768)
    for keys, items in ((64, 1), (128, 4), (256, 8)):
        q, x = new(items, 16, 12, 64), new(items, keys, 768)
        project = partial(cross_attention_fused.forward, q, x, weight, weight, *(None,) * 5, 0.125, False)
        yield "fused_forward", {"keys": keys, "rows": 16, "head": 64}, project
    for rows in (16, 64):
        q, k, v = (new(batch, 2 * rows, 12, 64) for _ in range(3))
        structure = (rows // 2, rows // 2, rows), "block", False, None, rows
        attend = partial(stream_attention.forward, q, k, v, *structure, *(None,) * 3, 0.125, False)
        yield "stream_forward", {"keys": 2 * rows, "rows": rows, "head": 64}, attend
    inputs = 768 + 2 * 768 + 2, 768 + 768
    gates = (modulation.Gate(new(64, n), new(64), new(768, 64), new(768)) for n in inputs)
    tokens, scalar, image = new(1024, 8, 768), new(1024), new(1024, 768)
    modulate = partial(modulation.forward, tokens, tokens, scalar, scalar, image, *gates, 1.0)
    yield "modulation_forward", {"rank": 64}, modulate


def neighbours(kernel: str, row: dict[str, int]) -> list[dict[str, int]]:
    """The row itself, then every combination of the neighbouring choices."""
    choices = _NEIGHBOURS[kernel.split("_")[0]]
    rows = [row | dict(zip(choices, values)) for values in itertools.product(*choices.values())]
    return [row, *(other for other in rows if other != row)]


def median_ms(launch: Launch, graph: bool = False) -> float:
    """Median time of one launch in milliseconds, between events or within the replay of a CUDA graph."""
    from triton.testing import do_bench, do_bench_cudagraph

    return float((do_bench_cudagraph if graph else do_bench)(launch, return_mode="median"))


class Tuning:
    """One run of tuning and the table it extends.

    Args:
        out: folder of the table; set ``TGQ_TILES`` to it, or copy the file to kernels/tiles, to use the table.
        only: shell glob over kernel names and "limits".
        budget_s: nothing is begun after so many seconds; what was found is kept.
        clock: (launch, whether in a CUDA graph) → milliseconds.

    Raises:
        BackendError: there is no CUDA device.
        ArgumentError: a table at `out` that is not one.
    """

    def __init__(
        self,
        out: Path,
        *,
        only: str = "*",
        budget_s: float = float("inf"),
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        clock: Clock = median_ms,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type == "cuda" and not torch.cuda.is_available():
            why = "no CUDA device; tune on the GPU that is to use the table, the shipped tables serve until then"
            raise BackendError("tune", "triton", {"triton": [why]})
        self.only, self.clock = only, clock
        self.end = time.monotonic() + budget_s
        on_gpu = self.device.type == "cuda"
        self.names = tiling.gpu_names(self.device.index or 0) if on_gpu else (tiling.INTERPRETER,)
        self.path = out / f"{self.names[0]}.json"
        self.table = {"gpu": self.names[0], "measured": True, "source": "tgq-fast tune", "timed": {}, "kernels": {}}
        if self.path.exists():
            try:
                self.table |= read_json(self.path.read_bytes())
            except (ValueError, TypeError) as error:
                raise ArgumentError(
                    "out", str(self.path), "a table that tuning wrote, or no file", str(error)
                ) from None

    def wants(self, name: str) -> bool:
        """Whether `name` is to be tuned and there is time."""
        return fnmatchcase(name, self.only) and time.monotonic() < self.end

    def fastest(self, tries: Iterator[tuple[Any, Launch]], *, graph: bool = False) -> tuple[Any, float] | None:
        """The choice whose launch takes least, and its milliseconds; those that fail are out."""
        best: tuple[Any, float] | None = None
        for choice, launch in tries:
            if best is not None and time.monotonic() >= self.end:
                break
            try:
                took = self.clock(launch, graph)
            except Exception as error:
                # Too much shared memory or registers for this GPU: the choice is out, tuning goes on.
                logger.info("%s: %s", choice, error)
                continue
            if best is None or took < best[1]:
                best = choice, took
        return best

    def tiles(self, work: Iterator[Case] | None = None) -> None:
        """Tune the rows of the kernels of `work`; default: all of :func:`cases`."""
        bits = str(8 * self.dtype.itemsize)
        for kernel, sizes, launch in work or cases(self.device, self.dtype):
            if not self.wants(kernel):
                continue
            # The own table stays out of the way of what it is compared with.
            shipped = tiling.rows(kernel, self.names[1:] or self.names, int(bits))
            rows = self.table["kernels"].setdefault(kernel, {}).setdefault(bits, [dict(row) for row in shipped])
            place = tiling.first_fit(rows, sizes)
            bounds = {key: value for key, value in rows[place].items() if key.startswith("max_")}
            options = {key: value for key, value in rows[place].items() if key not in bounds}

            def forced(row: dict[str, int], kernel: str = kernel, launch: Launch = launch) -> Launch:
                def call() -> None:
                    with tiling.forced(kernel, row):
                        launch()

                return call

            best = self.fastest((row, forced(row)) for row in neighbours(kernel, options))
            if best is not None:
                rows[place] = {**bounds, **best[0]}
                self.save(" ".join([kernel, bits, *(f"{k}={v}" for k, v in bounds.items())]), best[1])

    def save(self, what: str, figure: float) -> None:
        """Note what was tuned, with its milliseconds or value, and write the table."""
        logger.info("%s: %.4g", what, figure)
        self.table["timed"][what] = figure
        write_atomic(self.path, (json.dumps(self.table, indent=1) + "\n").encode())
