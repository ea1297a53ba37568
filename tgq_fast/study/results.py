"""Figures of a study from the ranks that its jobs wrote: means over seeds, intervals over groups, paired comparisons.

All intervals come from one bootstrap whose units are groups (connected components of the catalogue): queries of one
group share their products and are no independent draws. Seeds are averaged first, so that the interval speaks of the
catalogue; the spread over seeds is given beside it.

Source: percentile bootstrap and sign-flip permutation test are standard; the protocol is docs/method.md's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from tgq_fast.data.conditions import Condition
from tgq_fast.errors import ArgumentError, CheckpointError, TGQError
from tgq_fast.evaluation.metrics import group_sums, query_table

__all__ = ["Bootstrap", "Row", "families", "read_row", "summarise"]

SAMPLES, FLIPS = 2000, 2000
_NAMES = ("HR", "H")  # families of the headline metrics, with MRR


@dataclass(frozen=True)
class Row:
    """One line of the study: a floor, a connector or an ablation over its seeds.

    Attributes:
        name: of the line.
        numerator: condition → metric → [G] sums per group, averaged over seeds.
        denominator: metric → [G]; the same under every condition.
        seeds: condition → metric → value of each seed.
        facts: of its runs: parameters, recipe, seconds.
    """

    name: str
    numerator: Mapping[str, Mapping[str, NDArray[np.float64]]]
    denominator: Mapping[str, NDArray[np.float64]]
    seeds: Mapping[str, Mapping[str, Sequence[float]]]
    facts: Mapping[str, Any]


class Bootstrap:
    """Draws of groups with replacement, the same for every figure of a study.

    Args:
        groups: G.
        samples: draws.
        seed: of the draws.
    """

    def __init__(self, groups: int, samples: int = SAMPLES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.counts = rng.multinomial(groups, np.full(groups, 1.0 / groups), size=samples).astype(np.float64)
        self.signs = rng.integers(0, 2, size=(FLIPS, groups)) * 2.0 - 1.0

    def ratio(self, numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> tuple[float, float, float]:
        """(value, low, high) of Σ numerator / Σ denominator, 95 %."""
        below = self.counts @ denominator
        drawn = np.divide(self.counts @ numerator, below, out=np.full(len(below), np.nan), where=below != 0)
        total = float(denominator.sum())
        value = float(numerator.sum()) / total if total else float("nan")
        if not np.isfinite(drawn).any():
            return value, float("nan"), float("nan")
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        return value, float(low), float(high)

    def p_value(self, difference: NDArray[np.float64]) -> float:
        """Two-sided sign-flip test that Σ difference is 0 when the groups are exchangeable in sign."""
        drawn = np.abs(self.signs @ difference)
        return float((1 + (drawn >= abs(difference.sum()) - 1e-12).sum()) / (1 + len(drawn)))


def read_row(
    name: str, files: Sequence[Path], ks: Sequence[int], components: NDArray[np.int64], facts: Mapping[str, Any]
) -> Row:
    """A row from the ranks of its seeds.

    Args:
        files: .npz per seed: query, target, weight and "rank/<condition>", each [P].
        ks: cut-offs.
        components: [n] component of each item.

    Raises:
        ArgumentError: the seeds were evaluated on other pairs.
        CheckpointError: a file is damaged.
    """
    tables: dict[str, list[Any]] = {}
    first: dict[str, NDArray[Any]] = {}
    group: NDArray[np.int64] | None = None
    for file in files:
        with _arrays(file) as arrays:
            if first and any(not np.array_equal(first[key], arrays[key]) for key in ("query", "target")):
                raise ArgumentError("files", f"{file}: other pairs", "seeds evaluated on the same pairs")
            first = {key: arrays[key] for key in ("query", "target", "weight")}
            group = components[np.unique(first["query"])]
            for key in arrays.files:
                if key.startswith("rank/"):
                    table = query_table(first["query"], arrays[key], ks, weight=first["weight"])
                    tables.setdefault(key[5:], []).append(table)
    assert group is not None
    one = next(iter(tables.values()))[0]
    return Row(
        name,
        {
            text: {m: group_sums(np.mean([t.numerator[m] for t in each], axis=0), group) for m in one.numerator}
            for text, each in tables.items()
        },
        {metric: group_sums(values, group) for metric, values in one.denominator.items()},
        {text: {m: [t.value(m) for t in each] for m in one.numerator} for text, each in tables.items()},
        facts,
    )


@contextmanager
def _arrays(file: Path) -> Iterator[Any]:
    """The arrays of an .npz file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        if isinstance(error, TGQError):
            raise
        raise CheckpointError(f"{file}: missing or damaged ({error}); remove its folder to do the job again") from None


def families(conditions: Sequence[str]) -> dict[str, list[str]]:
    """Conditions that are averaged into one figure: "all" of them, and those of one kind where it has several."""
    found: dict[str, list[str]] = {}
    for text in conditions:
        condition = Condition.parse(text)
        found.setdefault(f"all {condition.kind}", []).append(text)
    several = {name: members for name, members in found.items() if len(members) > 1}
    return {"all": list(conditions), **several} if len(conditions) > 1 else {}


def summarise(rows: Sequence[Row], main: str, *, seed: int = 0) -> dict[str, Any]:
    """What a study says, JSON-ready.

    Args:
        rows: floors, connectors and ablations.
        main: name of the row that the others are compared with.

    Returns:
        "rows": name → {"metrics": condition → metric → value, low, high, seeds; "retention": condition → metric →
        share of the clean value that is left, low, high; "against": condition → metric → main minus this row, low,
        high, relative, p and verdict}; "wins": name → how many cells main wins, ties and loses. A ratio to 0 is None.
    """
    reference = next(row for row in rows if row.name == main)
    conditions = list(reference.numerator)
    metrics = [m for m in reference.denominator if m == "MRR" or m.split("@")[0] in _NAMES]
    draws = Bootstrap(len(next(iter(reference.denominator.values()))), seed=seed)
    pooled = families(conditions)
    places = {**{text: [text] for text in conditions}, **pooled}
    out: dict[str, Any] = {"main": main, "conditions": conditions, "pooled": pooled, "metrics": metrics, "rows": {}}
    for row in rows:
        told: dict[str, Any] = {"facts": dict(row.facts), "metrics": {}, "retention": {}, "against": {}}
        for place, members in places.items():
            for family in ("metrics", "retention", "against"):
                told[family][place] = {}
            for metric in metrics:
                mine, base = _mean(row, members, metric), row.denominator[metric]
                value, low, high = draws.ratio(mine, base)
                seeds = np.mean([row.seeds[text][metric] for text in members], axis=0)
                spread = [round(float(s), 6) for s in np.atleast_1d(seeds)]
                told["metrics"][place][metric] = {"value": value, "low": low, "high": high, "seeds": spread}
                if place != "clean":
                    told["retention"][place][metric] = _named(draws.ratio(mine, _mean(row, ["clean"], metric)))
                if row is not reference:
                    theirs = _mean(reference, members, metric)
                    told["against"][place][metric] = _compare(draws, theirs, mine, base)
        if row is reference:
            del told["against"]
        else:
            verdicts = [cell["verdict"] for text in conditions for cell in told["against"][text].values()]
            told["wins"] = {word: verdicts.count(word) for word in ("win", "tie", "loss")}
        out["rows"][row.name] = told
    return out


def _mean(row: Row, members: Sequence[str], metric: str) -> NDArray[np.float64]:
    return np.mean([row.numerator[text][metric] for text in members], axis=0)


def _named(found: tuple[float, float, float]) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), map(_defined, found), strict=True))


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _compare(
    draws: Bootstrap, main: NDArray[np.float64], other: NDArray[np.float64], base: NDArray[np.float64]
) -> dict[str, Any]:
    """Main against another row over the same groups; a win or loss is an interval that leaves 0 out."""
    value, low, high = draws.ratio(main - other, base)
    relative, relative_low, relative_high = draws.ratio(main, other)
    return {
        "difference": value,
        "low": low,
        "high": high,
        "relative": _defined(relative - 1),
        "relative_low": _defined(relative_low - 1),
        "relative_high": _defined(relative_high - 1),
        "p": draws.p_value(main - other),
        "verdict": "win" if low > 0 else "loss" if high < 0 else "tie",
    }
