"""What a report shows, as typed values: gathered by `tgq_fast.report.collect`, drawn by `tgq_fast.report.page`.

All text is plain (escaped by the page), all pictures are data URIs, all figures are inline SVG made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Metric:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RunResult:
    """One line of the result table.

    Attributes:
        name: shown everywhere the run is meant.
        metrics: metric name → value with interval.
        facts: what the run is (connector, fields, parameters, seed …), shown as label and text.
        curves: name of a logged quantity → (steps, values).
        baseline: a floor without training: no facts, no curves.
        beaten: metric → other runs' names that this one beats beyond the paired interval.
    """

    name: str
    metrics: Mapping[str, Metric]
    facts: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    baseline: bool = False
    beaten: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Neighbour:
    """One retrieved item: picture (None when it cannot be read), caption lines, score, whether it is a positive."""

    item_id: str
    picture: str | None
    title: str
    detail: str
    score: float
    hit: bool


@dataclass(frozen=True)
class Example:
    """A query with the neighbours that each run found.

    Attributes:
        positives: how many positives the query has in the pool.
        neighbours: (run name, rank of the best positive or None when out of reach, neighbours).
    """

    item_id: str
    picture: str | None
    title: str
    detail: str
    positives: int
    neighbours: Sequence[tuple[str, int | None, Sequence[Neighbour]]]


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one item's queries over its picture.

    Attributes:
        picture: the product picture.
        anchored, exploratory: overlays of the mean over each stream's queries; None when the stream is absent.
        queries: (label, overlay) of every single query.
        peaks: greatest weight of the two mean maps, in multiples of even attention.
        overlap: cosine similarity of the two mean maps.
    """

    item_id: str
    title: str
    guide: str
    picture: str
    anchored: str | None
    exploratory: str | None
    queries: Sequence[tuple[str, str]]
    peaks: tuple[float, float]
    overlap: float | None


@dataclass(frozen=True)
class GateStudy:
    """Gate values of sampled items.

    Attributes:
        run: name of the run.
        agreement: [n] standardised agreement s of each clean item; NaN where the model has none.
        anchored, exploratory: [n] mean gate per clean item, or None without that gate.
        overlay_levels: share of the picture under a promotional badge; 0 is the clean picture.
        overlay: stream → one [m] array of mean gates per level, over the same items.
        metadata: stream → {"true", "none", "wrong"} → [m] mean gates, over the same items.
    """

    run: str
    agreement: np.ndarray
    anchored: np.ndarray | None
    exploratory: np.ndarray | None
    overlay_levels: Sequence[float] = ()
    overlay: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page.

    Attributes:
        title: heading.
        facts: what was evaluated (catalogue, split, pool size …).
        runs: the compared runs, main run first; baselines may follow.
        verdict: whether training beat the better floor, by how much and how sure; the page begins with it.
        conditions: condition → the same runs where it holds.
        examples: sampled test queries; `example_note` says how they were sampled.
        attention: attention maps of the main run, when its connector has two streams.
        gates: gate study of the main run, when it has gates.
        catalogue: figures about the catalogue.
        notes: sentences the reader should know (skipped sections and why, unreadable pictures).
        made_by: version and command.
    """

    title: str
    facts: Mapping[str, str]
    runs: Sequence[RunResult]
    verdict: Sequence[str] = ()
    conditions: Mapping[str, Sequence[RunResult]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    example_note: str = ""
    attention: Sequence[AttentionMap] = ()
    gates: GateStudy | None = None
    catalogue: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    made_by: str = ""
