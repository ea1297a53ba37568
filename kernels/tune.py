"""Time tile rows on the GPU at hand and write the table of that GPU: the measured counterpart of the shipped tables.

For every kernel and shape class the shipped row and its neighbours (warps, pipeline depth, chunk of the width) are
launched on one representative shape; the fastest that compiles and runs is kept. Results are the same for every row up
to rounding: tiles change the order of sums only.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgq_fast.errors import BackendError
from tgq_fast.kernels import absorbed, modulation, streams, tiling

logger = logging.getLogger("tgq_fast.kernels.tune")

Case = tuple[str, dict[str, int], Callable[[], Any]]
_NEIGHBOURS: dict[str, dict[str, tuple[int, ...]]] = {
    "absorbed": {"num_warps": (4, 8), "num_stages": (2, 3, 4), "BLOCK_C": (32, 64), "BLOCK_O": (32, 64)},
    "stream": {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3), "BLOCK_K": (32, 64, 128)},
    "modulation": {"num_warps": (4, 8), "num_stages": (1, 2, 3), "ITEMS": (4, 8, 16), "BLOCK_C": (32, 64, 128)},
}


def cases(device: torch.device, dtype: torch.dtype, batch: int = 256) -> Iterator[Case]:
    """(kernel, shape class, launch) for every shape class that is worth its own row."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for keys in (64, 128, 256, 384, 512, 768):
        q, x = new(batch, 12, 16, 768), new(batch, keys - keys // 5, 768)
        stats = torch.zeros(batch, 12, 16, device=device)
        yield "absorbed_forward", {"max_keys": keys}, lambda q=q, x=x: absorbed.forward(q, x, None, None, 0.1, False)
        yield (
            "absorbed_backward_rows",
            {"max_keys": keys},
            lambda q=q, x=x, s=stats: absorbed.backward_rows(q, x, None, q, s, s, 0.1),
        )
    for rows in (16, 64):
        lengths = (rows // 2, rows // 2, rows)
        heads = [new(batch, 2 * rows, 12, 64) for _ in range(3)]
        bounds = {"max_rows": 16, "max_head": 64} if rows == 16 else {"max_head": 64}
        arguments = (lengths, "block", False, None, rows)

        def forward(heads=heads, arguments=arguments):  # type: ignore[no-untyped-def]
            return streams.forward(*heads, *arguments, None, 0.125, False)

        yield "stream_forward", bounds, forward
    inputs = 768 + 2 * 768 + 2, 768 + 768
    gates = [modulation.Gate(new(64, n), new(64), new(768, 64), new(768)) for n in inputs]
    tokens, scalar, image = new(1024, 8, 768), new(1024), new(1024, 768)

    def modulate() -> Any:
        return modulation.forward(tokens, tokens, scalar, scalar, image, *gates, 1.0, False)

    yield "modulation_forward", {"max_rank": 64}, modulate


def neighbours(kernel: str, row: dict[str, int]) -> list[dict[str, int]]:
    """The row itself, then every combination of the neighbouring choices."""
    choices = _NEIGHBOURS[kernel.split("_")[0]]
    rows = [row | dict(zip(choices, values)) for values in itertools.product(*choices.values())]
    return [row, *(other for other in rows if other != row)]


def tune(
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    time: Callable[[Callable[[], Any]], float] | None = None,
    work: Iterator[Case] | None = None,
) -> Path:
    """Write `<out>/<gpu>.json`; set ``TGQ_TILES`` to `out`, or copy the file to kernels/tiles, to use it.

    Args:
        time: milliseconds of one launch; default: the median of `triton.testing.do_bench`.
        work: cases to tune; default: all of :func:`cases`.

    Raises:
        BackendError: there is no CUDA device.
    """
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("tune", "triton", {"triton": ["no CUDA device"]})
    if time is None:
        from triton.testing import do_bench

        def time(launch: Callable[[], Any]) -> float:
            return do_bench(launch, return_mode="median")

    names = tiling.gpu_names(place.index or 0) if place.type == "cuda" else (tiling.INTERPRETER,)
    bits = 8 * dtype.itemsize
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kernel, bounds, launch in work or cases(place, dtype):
        sizes = {"keys": 0, "rows": 0, "head": 0, "rank": 0, **{k.removeprefix("max_"): v for k, v in bounds.items()}}
        best: tuple[float, dict[str, int]] | None = None
        for row in neighbours(kernel, tiling.pick(kernel, names, bits, **sizes)):
            with tiling.forced(kernel, row):
                try:
                    took = time(launch)
                except Exception as error:
                    # Too much shared memory or registers for this GPU: the row is out, tuning goes on.
                    logger.info("%s %s: %s", kernel, row, error)
                    continue
            if best is None or took < best[0]:
                best = took, row
        if best is None:
            continue
        logger.info("%s %s: %s in %.4f ms", kernel, bounds, best[1], best[0])
        kernels.setdefault(kernel, {}).setdefault(str(bits), []).append({**bounds, **best[1]})
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{names[0]}.json"
    data = {"gpu": names[0], "measured": True, "source": "tgq_fast.kernels.tune", "kernels": kernels}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path
