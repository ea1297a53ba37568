"""Plain mistakes in the types of arguments are named, by every function that a caller meets first."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tgq_fast
from tgq_fast import workflow
from tgq_fast.app import cli
from tgq_fast.arguments import checked
from tgq_fast.data import Catalog, import_catalog, parse_item, write_demo_catalog
from tgq_fast.errors import ArgumentError, TGQError
from tgq_fast.models import TGQFormerConfig
from tgq_fast.pool import ItemPool, duplicates, neighbours


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@checked
def example(
    count: int, share: float, name: str, flag: bool, path: str | Path | None = None, mode: Literal["a"] = "a"
) -> tuple[Any, ...]:
    return count, share, name, flag, path, mode


GOOD: dict[str, list[Any]] = {
    "count": [0, -5, True, np.int64(3), np.array(4), torch.tensor(5), 10**30],
    "share": [0.5, 1, np.float32(0.5), float("nan"), True],
    "name": ["", "x", np.str_("x")],
    "flag": [True, np.bool_(False)],
    "path": [None, "", "x", Path("x")],
    "mode": ["a", "another"],  # left to the function
}
BAD: dict[str, list[Any]] = {
    "count": [None, "3", 1.0, np.float64(2), [1], np.array([1]), torch.tensor([1, 2]), torch.tensor(1.5), Odd()],
    "share": [None, "0.5", 1j, [0.5], np.array([0.5]), Decimal("0.5"), Odd()],
    "name": [None, b"x", 3, Path("x"), ["x"], Odd()],
    "flag": [None, 1, "yes", np.array([True]), Odd()],
    "path": ["a" * 256, "a/" + "é" * 200 + "/b", 3, b"x", "a\0b", Path("a\0b"), ["x"], Odd()],
}
PLAIN = {"count": 1, "share": 0.5, "name": "x", "flag": True}


def test_what_fits_passes() -> None:
    for name, values in GOOD.items():
        for value in values:
            given = example(**{**PLAIN, name: value})
            assert given[list(GOOD).index(name)] is value
    assert example(1, 2.0, "x", False, "p") == (1, 2.0, "x", False, "p", "a")


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_is_named(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises(ArgumentError, match=f"^{name}: got {type(value).__name__}"):
            example(**{**PLAIN, name: value})


def test_public_functions_name_plain_mistakes(tmp_path: Path) -> None:
    catalog = Catalog.from_records([{"id": "a", "group_id": "g"}, {"id": "b", "group_id": "g"}])
    with ItemPool.create(tmp_path / "pool", dims=2) as made:
        made.append(["a", "b"], torch.eye(2))
    pool = ItemPool.open(tmp_path / "pool")
    calls: dict[str, Callable[[], object]] = {
        "dims": lambda: ItemPool.create(tmp_path / "x", dims="8"),  # type: ignore[arg-type]
        "shard_size": lambda: ItemPool.create(tmp_path / "x", dims=8, shard_size=1.5),  # type: ignore[arg-type]
        "model": lambda: ItemPool.create(tmp_path / "x", dims=8, model=b"m"),  # type: ignore[arg-type]
        "path": lambda: ItemPool.open(3),  # type: ignore[arg-type]
        "rows": lambda: list(pool.batches("3")),  # type: ignore[arg-type]
        "k": lambda: neighbours(pool, tmp_path / "n.csv", k="3"),  # type: ignore[arg-type]
        "threshold": lambda: duplicates(pool, "0.9"),  # type: ignore[arg-type]
        "where": lambda: pool.select(["price < 5"]),  # type: ignore[arg-type]
        "split": lambda: catalog.split_pairs(1),  # type: ignore[arg-type]
        "source": lambda: import_catalog(3, tmp_path, tmp_path / "i"),  # type: ignore[arg-type]
        "groups": lambda: write_demo_catalog(tmp_path / "d", groups="3"),  # type: ignore[arg-type]
        "hidden_size": lambda: TGQFormerConfig(hidden_size="8"),  # type: ignore[arg-type]
        "lr": lambda: tgq_fast.train(catalog, TGQFormerConfig(), out=tmp_path / "r", lr="1e-3"),  # type: ignore[arg-type]
        "samples": lambda: tgq_fast.evaluate(catalog, torch.eye(2), samples="9"),  # type: ignore[arg-type]
        "preset": lambda: workflow.connector_table(3),  # type: ignore[arg-type]
    }
    calls |= {
        "catalog": lambda: tgq_fast.train("shop", TGQFormerConfig(), out=tmp_path / "r"),  # type: ignore[arg-type]
        "pool": lambda: duplicates(tmp_path / "pool", 0.9),  # type: ignore[arg-type]
        "config": lambda: tgq_fast.train(catalog, {"hidden_size": 8}, out=tmp_path / "r"),  # type: ignore[arg-type]
        "fields": lambda: workflow.make_config(catalog, preset="tiny", fields="category"),
        "overrides": lambda: workflow.make_config(catalog, preset="tiny", overrides=["a"]),  # type: ignore[arg-type]
    }
    for name, mistake in calls.items():
        with pytest.raises(ArgumentError, match=f"^{name}: "):
            mistake()
    with pytest.raises(ArgumentError, match=r"^records: got int 5, expected something to iterate"):
        Catalog.from_records(5)  # type: ignore[arg-type]
    for odd in (5, "x", None, [1]):
        with pytest.raises(TGQError, match="expected a mapping of column to value"):
            parse_item(odd)  # type: ignore[arg-type]
    for rows in ([0, 1], torch.tensor([0]), np.array([0.0])):
        with pytest.raises(ArgumentError, match=r"^rows: "):
            pool.take(rows)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_a_value_of_the_wrong_type_on_the_command_line() -> None:
    done = CliRunner().invoke(cli.app, ["connectors", "--set", "hidden_size=wide"])
    assert done.exit_code == 2 and "hidden_size" in done.stderr and "whole number" in done.stderr
