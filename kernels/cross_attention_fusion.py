"""When absorbed attention runs as one fused launch, and into how many parts a fused call cuts its keys.

A model of time from bytes, as both ways are bound by what multiprocessors read from L2 and by launches:

* fused: every head of every item reads the tokens twice and its two weights, once per part of the keys; 1 or 2
  launches;
* separate: every 64 of the H · N rows read the tokens twice, q' and O' are written and read once each, 3 launches.

The rates are assumptions (H100), not measurements; only their ratios matter. `tgq-fast tune` writes the factor by which
the model misjudges the fused kernel on a GPU into that GPU's table.
"""

from __future__ import annotations

from dataclasses import dataclass

ALONE = 100e9  # bytes per second that one multiprocessor reads from L2 while the others are quiet
TOGETHER = 42e9  # the same when all of them read
LAUNCH_S = 2.5e-6  # end of one kernel to full speed of the next, in a CUDA graph
ROWS = 64  # of a tile of the separate kernel, and the most of the fused one
LEAST_KEYS, MOST_KEYS = 64, 256  # of a part; with fewer keys the weights of a head are more bytes than the tokens


def _tiles(n: int, size: int) -> int:
    return max(1, -(-n // size))


def parts(programs: int, length: int, processors: int) -> int:
    """Into how many parts the keys are cut: enough to fill the multiprocessors, if there are so many keys."""
    return max(_tiles(length, MOST_KEYS), min(_tiles(length, LEAST_KEYS), processors // max(1, programs)))


@dataclass(frozen=True)
class FusionCost:
    """Predicted microseconds of both ways."""

    fused: float
    separate: float

    @property
    def fuse(self) -> bool:
        return self.fused < self.separate

    def __str__(self) -> str:
        return f"{self.fused:.0f} us fused, {self.separate:.0f} us in three launches, by the model of L2 reads"


def fusion_cost(
    *,
    batch: int,
    queries: int,
    length: int,
    visual_width: int,
    num_heads: int,
    head: int,
    item_size: int,
    processors: int,
    correction: float = 1.0,
) -> FusionCost:
    """Predicted times of one forward call.

    Args:
        item_size: bytes of an element.
        processors: multiprocessors of the GPU.
        correction: multiplies the fused time.
    """

    def seconds(programs: int, values: int) -> float:
        """`programs` that read `values` elements each."""
        size = values * item_size
        return max(_tiles(programs, processors) * size / ALONE, programs * size / (processors * TOGETHER))

    row = visual_width * item_size
    heads = batch * num_heads * _tiles(queries, ROWS)
    cut = parts(heads, length, processors)
    fused = seconds(heads * cut, 2 * visual_width * (_tiles(length, cut) + head))
    rows = num_heads * queries
    separate = seconds(batch * _tiles(rows, ROWS), 2 * visual_width * (length + min(rows, ROWS)))
    products = 2 * (num_heads * head + batch * rows) * row  # weights, q' and O' through both batched products
    return FusionCost(
        1e6 * correction * (fused + LAUNCH_S * (2 if cut > 1 else 1)),
        1e6 * (separate + products / (processors * TOGETHER) + LAUNCH_S * 3),
    )
