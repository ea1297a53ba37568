"""Figures of a study: means over seeds, intervals over groups, paired comparisons, against numbers made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.evaluation.metrics import ABSENT, ranking_metrics
from tgq_fast.io.identity import sha256_file
from tgq_fast.io.sealed import seal
from tgq_fast.study.page import verdict
from tgq_fast.study.plan import Plan
from tgq_fast.study.results import Bootstrap, Row, families, read_row, summarise
from tgq_fast.study.worker import finished

KS = (1, 10)
GROUPS = np.repeat(np.arange(30), 4)  # 30 groups of four items


def pairs() -> tuple[np.ndarray, np.ndarray]:
    query = np.repeat(np.arange(120), 3)
    place = np.tile([1, 2, 3], 120)
    return query, query - query % 4 + (query % 4 + place) % 4


def write(path: Path, ranks: dict[str, np.ndarray]) -> Path:
    query, target = pairs()
    weight = np.ones(len(query))
    np.savez(path, query=query, target=target, weight=weight, **{f"rank/{k}": v for k, v in ranks.items()})  # type: ignore[arg-type]
    return path


def ranks(seed: int, scale: float) -> np.ndarray:
    """Distinct ranks per query; larger with the scale."""
    rng = np.random.default_rng(seed)
    base = rng.geometric(1 / scale, size=120)
    return (base[:, None] + np.arange(3)).reshape(-1).astype(np.int64)


def rows(folder: Path, main: float, other: float, seeds: int = 2) -> list[Row]:
    made = []
    for name, scale in (("tgq", main), ("mlp", other)):
        files = [
            write(
                folder / f"{name}{seed}.npz", {"clean": ranks(seed, scale), "overlay:0.3:both": ranks(seed, 2 * scale)}
            )
            for seed in range(seeds)
        ]
        made.append(read_row(name, files, KS, GROUPS, {"stage": "final"}))
    return made


def test_values_are_means_over_seeds_of_the_metrics(tmp_path: Path) -> None:
    first, _ = rows(tmp_path, 5, 9)
    found = summarise([first], "tgq")["rows"]["tgq"]["metrics"]["clean"]
    query, _ = pairs()
    for metric in ("HR@1", "H@10", "MRR"):
        each = [ranking_metrics(query, ranks(seed, 5), KS, samples=0)[metric].value for seed in range(2)]
        assert found[metric]["value"] == pytest.approx(np.mean(each))
        assert found[metric]["seeds"] == pytest.approx(each, abs=1e-5)
        assert found[metric]["low"] < found[metric]["value"] < found[metric]["high"]


def test_intervals_draw_groups_not_queries() -> None:
    """Queries of a group that all agree carry no more news than one: the interval is twice as wide as over queries."""
    rng = np.random.default_rng(0)
    same = np.repeat(rng.integers(0, 2, 100), 4).astype(float)
    grouped = Bootstrap(100).ratio(same.reshape(100, 4).sum(1), np.full(100, 4.0))
    single = Bootstrap(400).ratio(same, np.ones(400))
    assert grouped[0] == single[0]
    assert 1.7 < (grouped[2] - grouped[1]) / (single[2] - single[1]) < 2.3


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = rng.binomial(4, 0.3, size=80).astype(float)
        _, low, high = Bootstrap(80, samples=400).ratio(values, np.full(80, 4.0))
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_p_values_are_even_under_no_difference_and_small_under_one() -> None:
    rng = np.random.default_rng(2)
    draws = Bootstrap(60)
    nothing = np.array([draws.p_value(rng.normal(size=60)) for _ in range(300)])
    assert 0.02 <= (nothing < 0.1).mean() <= 0.18 and abs(np.median(nothing) - 0.5) < 0.1
    assert draws.p_value(rng.normal(0.8, 1, size=60)) < 0.01
    assert draws.p_value(np.zeros(60)) == 1.0


def test_a_better_row_wins_and_the_sign_is_right(tmp_path: Path) -> None:
    study = summarise(rows(tmp_path, 3, 30), "tgq")
    cell = study["rows"]["mlp"]["against"]["clean"]["HR@10"]
    assert cell["verdict"] == "win" and cell["difference"] > 0 and cell["low"] > 0 and cell["p"] < 0.01
    assert cell["relative"] == pytest.approx(
        study["rows"]["tgq"]["metrics"]["clean"]["HR@10"]["value"]
        / study["rows"]["mlp"]["metrics"]["clean"]["HR@10"]["value"]
        - 1
    )
    (tmp_path / "swapped").mkdir()
    worse = summarise(rows(tmp_path / "swapped", 30, 3), "tgq")["rows"]["mlp"]
    assert worse["against"]["clean"]["HR@10"]["verdict"] == "loss" and worse["wins"]["win"] == 0
    (tmp_path / "same").mkdir()
    same = summarise(rows(tmp_path / "same", 5, 5), "tgq")["rows"]["mlp"]
    assert same["wins"]["tie"] == sum(same["wins"].values()) and same["against"]["all"]["MRR"]["difference"] == 0


def test_pooled_conditions_and_retention(tmp_path: Path) -> None:
    study = summarise(rows(tmp_path, 5, 9), "tgq")
    cells = study["rows"]["tgq"]["metrics"]
    one = [cells[text]["H@10"]["value"] for text in ("clean", "overlay:0.3:both")]
    assert cells["all"]["H@10"]["value"] == pytest.approx(np.mean(one))
    left = study["rows"]["tgq"]["retention"]["overlay:0.3:both"]["H@10"]
    assert left["value"] == pytest.approx(one[1] / one[0]) and left["low"] < left["value"] < left["high"]
    assert families(["clean", "scene:4:query", "scene:4:pool", "badge:0.1:both"]) == {
        "all": ["clean", "scene:4:query", "scene:4:pool", "badge:0.1:both"],
        "all scene": ["scene:4:query", "scene:4:pool"],
    }
    assert families(["clean"]) == {}


def test_a_share_of_nothing_is_none(tmp_path: Path) -> None:
    none = np.full(360, ABSENT)
    made = [
        read_row(
            name, [write(tmp_path / f"{name}.npz", {"clean": clean, "scene:4:both": ranks(0, 5)})], KS, GROUPS, facts
        )
        for name, clean, facts in (("tgq", ranks(0, 5), {}), ("mlp", none, {}))
    ]
    told = summarise(made, "tgq")
    assert told["rows"]["mlp"]["retention"]["scene:4:both"]["HR@10"] == {"value": None, "low": None, "high": None}
    cell = told["rows"]["mlp"]["against"]["clean"]["HR@10"]
    assert cell["relative"] is None and cell["verdict"] == "win"
    json.dumps(told, allow_nan=False)
    assert "on clean pictures: H@10 0.825 against 0.000, p < 0.001." in " ".join(verdict(told))


def test_seeds_of_other_pairs_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.npz", {"clean": ranks(0, 5)})
    query, target = pairs()
    np.savez(
        tmp_path / "b.npz", query=query, target=target[::-1], weight=np.ones(len(query)), **{"rank/clean": ranks(0, 5)}
    )
    with pytest.raises(ArgumentError, match="same pairs"):
        read_row("tgq", [first, tmp_path / "b.npz"], KS, GROUPS, {})


def test_missing_positives_count_as_misses(tmp_path: Path) -> None:
    found = read_row("x", [write(tmp_path / "a.npz", {"clean": np.full(360, ABSENT)})], KS, GROUPS, {})
    assert summarise([found], "x")["rows"]["x"]["metrics"]["clean"]["H@10"]["value"] == 0.0


def test_a_damaged_result_is_no_result(tmp_path: Path) -> None:
    """One changed character, or one changed bit of the ranks: the job is done again."""
    write(tmp_path / "ranks.npz", {"clean": ranks(0, 5)})
    digest = sha256_file(tmp_path / "ranks.npz")
    row = {"ranks": "ranks.npz", "sha256": digest, "conditions": {"clean": {"HR@1": 0.5}}}
    result = {"rows": {"tgq": row}}
    (tmp_path / "result.json").write_text(json.dumps(seal(result)))
    plan = Plan("x", "digest", (), conditions=("clean",))
    assert finished(tmp_path, plan) == result
    assert finished(tmp_path, Plan("x", "digest", (), conditions=("clean", "scene:4:query"))) is None
    text = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").write_text(text.replace("0.5", "0.6"))
    assert finished(tmp_path, plan) is None
    (tmp_path / "result.json").write_text(text)
    data = bytearray((tmp_path / "ranks.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "ranks.npz").write_bytes(data)
    assert finished(tmp_path, plan) is None
    with pytest.raises(CheckpointError, match="damaged"):
        read_row("tgq", [tmp_path / "ranks.npz"], KS, GROUPS, {})
    del row["sha256"]  # as earlier releases wrote it
    write(tmp_path / "ranks.npz", {"clean": ranks(0, 5)})
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert finished(tmp_path, plan) == result
