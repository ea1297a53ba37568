"""A pool of small vectors and what it must hold."""

from __future__ import annotations

import random

import torch

from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.reference import exact_topk

WIDTH = 6


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-2, 3, (n, WIDTH), generator=torch.Generator().manual_seed(seed)).float()  # many ties


class Model:
    """A pool as a plain list: what the real one must equal."""

    def __init__(self) -> None:
        self.items: list[tuple[str, torch.Tensor]] = []

    def upsert(self, ids: list[str], rows: torch.Tensor) -> None:
        self.delete(ids)
        self.items += list(zip(ids, rows))

    def delete(self, ids: list[str]) -> None:
        self.items = [item for item in self.items if item[0] not in set(ids)]

    def check(self, pool: ItemPool) -> None:
        ids = [name for name, _ in self.items]
        rows = torch.stack([row for _, row in self.items]) if ids else torch.empty(0, WIDTH)
        assert pool.ids() == ids and len(pool) == len(ids)
        assert torch.equal(pool.embeddings(), rows)
        assert [start for start, _ in pool.shards()] == sorted(start for start, _ in pool.shards())
        assert torch.equal(torch.cat([part for _, part in pool.batches(4)] or [rows]), rows)
        queries = vectors(5, seed=99)
        excluded = [ids[:2], [], ["nobody"], ids[-1:], ids[3:5]]
        table = torch.tensor([[ids.index(x) if x in ids else -1 for x in (*e, "", "")[:2]] for e in excluded])
        for k in (1, 4, 30):
            found, expected = pool.search(queries, k, exclude_ids=excluded), exact_topk(queries, rows, k, exclude=table)
            assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
            assert found.ids == [[None if i < 0 else ids[i] for i in line] for line in expected.indices.tolist()]
        order = random.Random(0).sample(range(len(ids)), len(ids))
        assert pool.rows([*(ids[i] for i in order), "nobody"], missing="mark").tolist() == [*order, -1]
        assert torch.equal(pool.get([ids[i] for i in order]), rows[order])
