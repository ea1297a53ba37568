"""What callers hand to a pool: rows that no item has, and tensors without values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tgq_fast.errors import ArgumentError
from tgq_fast.pool.item_pool import ItemPool

VECTORS = torch.randn(25, 8, generator=torch.Generator().manual_seed(0))
NAMES = [f"item {i}" for i in range(25)]


def made(folder: Path) -> ItemPool:
    with ItemPool.create(folder, dims=8, shard_size=10) as pool:
        pool.append(NAMES, VECTORS)
    return ItemPool.open(folder)


@pytest.mark.parametrize("rows", [[-1], [0.5], [True], [25], [[0]]])
def test_rows_that_no_item_has_are_refused(tmp_path: Path, rows: list) -> None:
    pool = made(tmp_path / "pool")
    with pytest.raises(ArgumentError, match=r"^rows\b"):
        pool.take(np.array(rows))
    assert torch.equal(pool.take(np.array([3, 24], dtype=np.uint64)), VECTORS[[3, 24]])


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    with ItemPool.create(tmp_path / "pool", dims=VECTORS.shape[1]) as pool, pytest.raises(ArgumentError, match="meta"):
        pool.append(NAMES[:3], VECTORS[:3].to("meta"))
    pool = made(tmp_path / "made")
    with pytest.raises(ArgumentError, match="meta"):
        pool.search(VECTORS[:3].to("meta"), 2)
    for indices in ([[0]], torch.zeros(3, dtype=torch.int64), torch.zeros(1, 1).to("meta"), torch.zeros(1, 1)):
        with pytest.raises(ArgumentError):
            pool.ids_at(indices)  # type: ignore[arg-type]
