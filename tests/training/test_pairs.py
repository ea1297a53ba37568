"""Pairs, batches of distinct items and the collator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import SyntheticStore, make_catalog, make_config

from tgq_fast.data import Catalog, Item
from tgq_fast.errors import ArgumentError
from tgq_fast.training import DistinctBatchSampler, PairCollator, PairDataset


def test_each_unordered_pair_once() -> None:
    catalog = make_catalog(groups=30, size=4)
    split = catalog.split_pairs("train")
    expected = {frozenset(p) for p in zip(split.query.tolist(), split.target.tolist(), strict=True)}
    dataset = PairDataset(catalog)
    assert len(dataset) == len(expected) and {frozenset(dataset[i]) for i in range(len(dataset))} == expected


def test_pairs_of_unusable_items_are_left_out() -> None:
    catalog = make_catalog(groups=30)
    valid = np.ones(len(catalog), dtype=bool)
    lost = int(catalog.split_pairs("train").query[0])
    valid[lost] = False
    kept = PairDataset(catalog, valid=valid)
    assert 0 < len(kept) < len(PairDataset(catalog)) and lost not in kept.pairs
    with pytest.raises(ArgumentError, match="no usable pair"):
        PairDataset(catalog, valid=np.zeros(len(catalog), dtype=bool))


def items_of(sampler: DistinctBatchSampler, batch: list[int]) -> list[int]:
    return sampler.pairs[batch].reshape(-1).tolist()


def test_epochs_are_pure_functions_and_cover_the_items() -> None:
    dataset = PairDataset(make_catalog(groups=60, size=3))
    sampler = DistinctBatchSampler(dataset, 8, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again and len(first) == len(sampler) == len(np.unique(dataset.pairs)) // 8
    seen = {item for batch in first for item in items_of(sampler, batch)}
    assert len(seen) >= 0.95 * len(np.unique(dataset.pairs))  # only conflicts at the very end leave an item out
    sampler.set_epoch(1)
    assert list(sampler) != first
    other = DistinctBatchSampler(dataset, 8, seed=2)
    assert list(other) != first


def test_a_large_group_does_not_outweigh_the_others() -> None:
    pairs = [(b, a) for a in range(20) for b in range(a)]  # 190 of 250 pairs, 20 of 140 items
    pairs += [(a, a + 1) for a in range(20, 140, 2)]
    components = np.array([0] * 20 + [a // 2 for a in range(20, 140)])
    dataset = SimpleNamespace(pairs=np.array(pairs), components=components, weights=np.ones(len(pairs)))
    sampler = DistinctBatchSampler(dataset, 4, seed=0)  # type: ignore[arg-type]
    drawn = np.concatenate([sampler.pairs[batch] for batch in sampler])
    assert np.mean(drawn < 20) == pytest.approx(20 / 140, abs=0.05)


def test_pairs_are_drawn_by_their_weight() -> None:
    pairs = np.array([(0, 1), (0, 2), (0, 3)])
    dataset = SimpleNamespace(pairs=pairs, components=np.zeros(4), weights=np.array([3.0, 1.0, 1e-9]))
    sampler = DistinctBatchSampler(dataset, 1, seed=0)  # type: ignore[arg-type]
    drawn = sampler._by_item[[sampler._draw(np.random.default_rng(n))[0] for n in range(4000)]] // 2
    assert (drawn == 0).mean() == pytest.approx(0.75, abs=0.03) and not (drawn == 2).any()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    batch_size=st.integers(1, 20),
    epoch=st.integers(0, 3),
)
def test_no_item_twice_and_full_batches(sizes: list[int], batch_size: int, epoch: int) -> None:
    items = [
        Item(f"{g}-{v}", None, None, None, None, {}, None, f"g{g}", 1)
        for g, size in enumerate(sizes)
        for v in range(size)
    ]
    catalog = Catalog.from_items(items)
    if not len(catalog.split_pairs("train").query):
        with pytest.raises(ArgumentError):
            PairDataset(catalog)
        return
    sampler = DistinctBatchSampler(PairDataset(catalog), batch_size, seed=0)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) >= 1
    for batch in batches:
        assert len(batch) == sampler.batch_size == min(batch_size, sampler.largest)
        rows = items_of(sampler, batch)
        assert len(set(rows)) == len(rows)


def test_collator() -> None:
    catalog = make_catalog(groups=30)
    config = make_config(field_dropout=0.4)
    store = SyntheticStore(catalog, config)
    collate = PairCollator(store, catalog.components(), seed=3)  # type: ignore[arg-type]
    pairs = [(0, 1), (3, 4), (7, 6), (9, 11)]
    batch = collate(pairs)
    assert batch["positives"].tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert batch["groups"].tolist() == catalog.components()[[0, 1, 3, 4, 7, 6, 9, 11]].tolist()
    assert torch.equal(batch["features"].visual_tokens, store.visual[[0, 1, 3, 4, 7, 6, 9, 11]])
    again = collate(pairs)
    assert torch.equal(again["features"].metadata_mask, batch["features"].metadata_mask)
    masks = {tuple(collate([(a, a + 1)])["features"].metadata_mask.flatten().tolist()) for a in range(0, 60, 3)}
    assert len(masks) > 3  # other batches drop other fields
    for start in range(0, 87, 3):
        collate([(start, start + 1), (start + 1, start + 2)])
    assert np.mean(store.dropped) == pytest.approx(0.4, abs=0.1)
    other = PairCollator(store, catalog.components(), seed=4)  # type: ignore[arg-type]
    different = [
        not torch.equal(other([(a, a + 1)])["features"].metadata_mask, collate([(a, a + 1)])["features"].metadata_mask)
        for a in range(0, 30, 3)
    ]
    assert any(different)
