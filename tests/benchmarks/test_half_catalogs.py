"""Random halves of a catalogue: every item in one of them, with its siblings, its pairs and its picture."""

from __future__ import annotations

from pathlib import Path

from benchmarks.half_catalogs import halve
from tgq_fast.data import Catalog, write_demo_catalog


def test_halves_share_no_product(tmp_path: Path) -> None:
    write_demo_catalog(tmp_path / "shop", groups=7)
    shop = Catalog.load(tmp_path / "shop")
    targets = tmp_path / "one", tmp_path / "other"
    sizes = halve(tmp_path / "shop", targets, seed=3)
    halves = [Catalog.load(target) for target in targets]
    assert sizes == (len(halves[0]), len(halves[1])) and min(sizes) > 0
    assert sorted([*halves[0].ids, *halves[1].ids]) == sorted(shop.ids)
    groups = [{item.group_id for item in half.items} for half in halves]
    assert not groups[0] & groups[1]
    pairs = [half.split_pairs("train", every=True) for half in (shop, *halves)]
    assert len(pairs[0]) == len(pairs[1]) + len(pairs[2])
    assert all(half.image_path(item).is_file() for half in halves for item in half.items if item.file_name)
