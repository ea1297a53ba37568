"""Batches of positive pairs: B pairs are 2B distinct items, known co-positives are labelled and leave the negatives.

Source: all 2B gathered items of a batch are each other's candidates, as in NoteLLM-2; distinct items per batch and the
stateless field dropout are ours.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.processing import TGQFormerProcessor

__all__ = ["DistinctBatchSampler", "PairCollator", "PairDataset"]


class PairDataset(Dataset[tuple[int, int]]):
    """Positive pairs of one split, each unordered pair once.

    Both directions of a pair train in the same batch (every item is an anchor), so a pair and its mirror image are one
    example. Pair weights do not enter the loss.

    Args:
        catalog: the catalogue.
        split: "train", "validation" or "test".
        valid: [n] bool rows that may be used; pairs with any other row are left out. None: all.

    Raises:
        ArgumentError: no usable pair is left.
    """

    def __init__(self, catalog: Catalog, split: str = "train", *, valid: np.ndarray | None = None) -> None:
        pairs = catalog.split_pairs(split)
        both = np.stack((np.minimum(pairs.query, pairs.target), np.maximum(pairs.query, pairs.target)), axis=1)
        both = np.unique(both[both[:, 0] != both[:, 1]], axis=0)  # [P, 2], sorted: independent of the file's order
        if valid is not None:
            both = both[valid[both].all(axis=1)]
        if not len(both):
            raise ArgumentError(
                "catalog", f"no usable pair in split {split!r}", "at least one pair of items with images"
            )
        self.pairs: np.ndarray = both
        self.components = catalog.components()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, int]:
        query, target = self.pairs[index]
        return int(query), int(target)


class DistinctBatchSampler(Sampler[list[int]]):
    """Batches of pair indices in which no item occurs twice; every epoch is a pure function of (seed, epoch).

    An epoch draws one pair for every item that has one, uniformly among its pairs, so that a group of many variants,
    whose pairs grow with its square, does not outweigh the others [ours]. A pair that would repeat an item waits for a
    later batch of the epoch. When only such pairs are left, the last batches are filled with other pairs, so that the
    number of batches is always ⌊items / B⌋, and at least one.

    Args:
        dataset: the pairs.
        batch_size: B. Lowered to :attr:`largest` when the pairs cannot fill it with distinct items.
        seed: of the order.

    Attributes:
        batch_size: B in use.
        largest: the largest B that can always be filled.
    """

    def __init__(self, dataset: PairDataset, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ArgumentError("batch_size", batch_size, "at least 1 pair")
        self.pairs = dataset.pairs
        self.seed, self.epoch = seed, 0
        ends = self.pairs.reshape(-1)  # pair i owns places 2i and 2i + 1
        self._by_item = np.argsort(ends, kind="stable")  # places, grouped by item
        self._count = np.unique(ends, return_counts=True)[1]
        self._start = np.concatenate(([0], np.cumsum(self._count)[:-1]))
        # Any greedy choice ends as a maximal matching: at least one pair per component, and at least half of any other.
        components = len(np.unique(dataset.components[self.pairs[:, 0]]))
        matching = len(self._fill(iter(range(len(self.pairs))), len(self.pairs), [])[0])
        self.largest = max(components, (matching + 1) // 2)
        self.batch_size = min(batch_size, self.largest)
        self.drop_last = True

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, len(self._count) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = self._by_item[self._start + rng.integers(self._count)] // 2  # one pair per item
        fresh = iter(rng.permutation(drawn).tolist())
        waiting: list[int] = []
        for _ in range(len(self)):
            batch, items = self._take_waiting(waiting)
            more, skipped = self._fill(fresh, self.batch_size - len(batch), items)
            batch += more
            waiting += skipped
            if len(batch) < self.batch_size:  # only conflicting pairs are left: fill up from all pairs
                every = iter(rng.permutation(len(self.pairs)).tolist())
                batch += self._fill(every, self.batch_size - len(batch), items)[0]
            yield batch

    def _take_waiting(self, waiting: list[int]) -> tuple[list[int], list[int]]:
        items: list[int] = []
        batch, still = self._fill(iter(list(waiting)), self.batch_size, items)
        taken = set(batch)
        waiting[:] = [index for index in waiting if index not in taken] if len(batch) == self.batch_size else still
        return batch, items

    def _fill(self, candidates: Iterator[int], room: int, items: list[int]) -> tuple[list[int], list[int]]:
        """Take up to `room` candidates that repeat nothing in `items`, which grows; returns (taken, skipped)."""
        used = set(items)
        taken: list[int] = []
        skipped: list[int] = []
        while len(taken) < room:
            index = next(candidates, None)
            if index is None:
                break
            query, target = self.pairs[index].tolist()
            if query in used or target in used:
                skipped.append(index)
                continue
            used.update((query, target))
            items += (query, target)
            taken.append(index)
        return taken, skipped


class PairCollator:
    """B pairs → the model's keyword arguments for their 2B items: query 0, target 0, query 1, target 1, …

    The features are a gather from the memory-mapped cache. Field dropout is a function of (seed, the batch's rows): a
    resumed run drops the same fields, and another epoch, which draws other pairs, drops others.

    Args:
        store: feature cache of the catalogue.
        components: [n] component labels; items that share one are known co-positives and not each other's negatives.
        seed: of the field dropout.
        processor: makes the prompts, needed with an LLM.
    """

    def __init__(
        self,
        store: FeatureStore,
        components: np.ndarray,
        *,
        seed: int,
        processor: TGQFormerProcessor | None = None,
    ) -> None:
        self.store, self.components, self.seed, self.processor = store, components, seed, processor

    def __call__(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Keyword arguments of :meth:`TGQFormerModel.forward`: features, positives, groups, and prompt with an LLM."""
        rows = np.asarray(pairs, dtype=np.int64).reshape(-1)
        rng = np.random.default_rng([self.seed, zlib.crc32(rows.tobytes())])
        return {
            **self.store.inputs(rows, processor=self.processor, drop_fields=rng),
            "positives": torch.arange(len(rows)) ^ 1,  # neighbours swap: 0 ↔ 1, 2 ↔ 3, …
            "groups": torch.from_numpy(self.components[rows]),
        }
