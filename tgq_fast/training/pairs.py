"""Batches of positive pairs: B pairs are 2B distinct items, known co-positives are labelled and leave the negatives.

Source: all 2B gathered items of a batch are each other's candidates, as in NoteLLM-2; distinct items per batch and the
stateless field dropout are ours.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.pictures import ChosenViews, PictureFeatures
from tgq_fast.models.processing import TGQFormerProcessor

__all__ = ["DistinctBatchSampler", "PairCollator", "PairDataset", "TrainingViews"]


class PairDataset(Dataset[tuple[int, int]]):
    """Positive pairs of one split, each unordered pair once.

    Both directions of a pair train in the same batch (every item is an anchor), so a pair and its mirror image are one
    example, with the larger of their weights. A pair of weight 0 does not train.

    Attributes:
        pairs: [P, 2] rows, sorted.
        weights: [P] how often a pair is drawn compared with the other pairs of its items.

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
        weights = np.asarray(pairs.weight, dtype=np.float64)
        used = (both[:, 0] != both[:, 1]) & (weights > 0)
        both, place = np.unique(both[used], axis=0, return_inverse=True)  # [P, 2], sorted: free of the file's order
        largest = np.zeros(len(both))
        np.maximum.at(largest, place.reshape(-1), weights[used])
        if valid is not None:
            kept = valid[both].all(axis=1)
            both, largest = both[kept], largest[kept]
        if not len(both):
            raise ArgumentError(
                "catalog", f"no usable pair in split {split!r}", "at least one pair of items with images"
            )
        self.pairs: np.ndarray = both
        self.weights: np.ndarray = largest
        self.components = catalog.components()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, int]:
        query, target = self.pairs[index]
        return int(query), int(target)


class DistinctBatchSampler(Sampler[list[int]]):
    """Batches of pair indices in which no item occurs twice; every epoch is a pure function of (seed, epoch).

    An epoch draws one pair for every item that has one, among its pairs in proportion to their weights, so that a group
    of many variants, whose pairs grow with its square, does not outweigh the others [ours]. A pair that would repeat an
    item waits for a later batch of the epoch. When only such pairs are left, the last batches are filled with other
    pairs, so that the number of batches is always ⌊items / B⌋, and at least one.

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
        # Where each place ends when the weights of all places are laid one after the other.
        self._ends = np.cumsum(dataset.weights[self._by_item // 2])
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
        drawn = self._by_item[self._draw(rng)] // 2  # one pair per item
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

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """One place per item, with a chance in proportion to its pair's weight."""
        last = self._start + self._count - 1
        before = np.where(self._start > 0, self._ends[self._start - 1], 0.0)
        aim = before + rng.random(len(self._count)) * (self._ends[last] - before)
        return np.clip(np.searchsorted(self._ends, aim, side="right"), self._start, last)

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


class TrainingViews(Protocol):
    """Corrupted pictures of the training items; :class:`tgq_fast.models.views.ViewStore` is one."""

    @property
    def shares(self) -> np.ndarray:
        """[V, 2, L] share of each token's cell that shows the item, and that shows anything foreign."""
        ...

    def draw(self, rows: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
        """[B] view of each row, or -1 for the item's own picture, which is kept with probability 1 - share."""
        ...


class PairCollator:
    """B pairs → the model's keyword arguments for their 2B items: query 0, target 0, query 1, target 1, …

    The features are a gather from the memory-mapped cache. What is drawn (field dropout, views, unreliable metadata) is
    a function of (seed, the batch's rows): a resumed run draws the same, and another epoch, which draws other pairs,
    draws anew.

    Args:
        store: feature cache of the catalogue; its configuration holds the probabilities.
        components: [n] component labels; items that share one are known co-positives and not each other's negatives.
        seed: of all that is drawn.
        processor: makes the prompts, needed with an LLM.
        views: corrupted pictures that stand in for the items' own with probability `config.view_share`.
        pictures: features of the views, whitened as the store's are.
        part: (rank, ranks): everything is drawn for the whole batch, and this rank's share of its pairs is returned, so
            that the same batches train whatever the number of processes.
    """

    def __init__(
        self,
        store: FeatureStore,
        components: np.ndarray,
        *,
        seed: int,
        processor: TGQFormerProcessor | None = None,
        views: TrainingViews | None = None,
        pictures: PictureFeatures | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.part = part
        self.store, self.components, self.seed, self.processor = store, components, seed, processor
        self.views, self.pictures = views, pictures
        self._rows = np.flatnonzero(np.asarray(store.valid)) if store.config.wrong_metadata else None

    def __call__(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Keyword arguments of :meth:`TGQFormerModel.forward`: features, positives, groups, and prompt with an LLM."""
        rows = np.asarray(pairs, dtype=np.int64).reshape(-1)
        rng = np.random.default_rng([self.seed, zlib.crc32(rows.tobytes())])
        config = self.store.config
        source, trusted, keep = rows, None, None
        if config.wrong_metadata or config.partial_metadata or config.missing_metadata:
            keep, source, trusted = self._unreliable(rows, rng)
        chosen = None
        if self.views is not None and self.pictures is not None and config.view_share:
            chosen = self.views.draw(rows, config.view_share, rng)
        if keep is None:
            keep = self.store.draw_keep(len(rows), rng)
        rank, ranks = self.part
        own = slice(2 * (len(rows) // 2 * rank // ranks), 2 * (len(rows) // 2 * (rank + 1) // ranks))
        rows, source, keep = rows[own], source[own], keep[own]
        arguments: dict[str, Any] = {"keep": keep}
        if trusted is not None:
            arguments["metadata_from"] = source
        if chosen is not None:
            chosen = chosen[own]
            arguments["views"] = ChosenViews(self.pictures, chosen)  # type: ignore[arg-type]
        inputs = self.store.inputs(rows, processor=self.processor, **arguments)
        features = inputs["features"]
        features.trusted = None if trusted is None else trusted[own]
        if chosen is not None:
            features.product_share = self._shares(chosen, features.visual_tokens.shape[1])
        return {
            **inputs,
            "positives": torch.arange(len(rows)) ^ 1,  # neighbours swap: 0 ↔ 1, 2 ↔ 3, …
            "groups": torch.from_numpy(self.components[rows]),
        }

    def _unreliable(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Fields to keep, rows to take the metadata from, and which items keep their own: the others get another
        item's, a part of the fields, or none."""
        config = self.store.config
        keep = self.store.draw_keep(len(rows), rng)
        kind = rng.random(len(rows))
        wrong = kind < config.wrong_metadata
        partial = ~wrong & (kind < config.wrong_metadata + config.partial_metadata)
        missing = ~wrong & ~partial & (kind < config.wrong_metadata + config.partial_metadata + config.missing_metadata)
        keep[partial] &= rng.random((int(partial.sum()), keep.shape[1])) < 0.5
        keep[missing] = False
        source = rows.copy()
        if self._rows is not None:
            source[wrong] = rng.choice(self._rows, int(wrong.sum()))
        return keep, source, torch.from_numpy(~wrong)

    def _shares(self, chosen: np.ndarray, length: int) -> Tensor:
        """[B, L] share of each token that shows the item: all of it in an item's own picture."""
        assert self.views is not None
        share = np.ones((len(chosen), length), np.float32)
        seen = chosen >= 0
        share[seen] = self.views.shares[chosen[seen], 0]
        return torch.from_numpy(share)
