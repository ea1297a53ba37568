"""What a report page is tested with."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tgq_fast.report import figures
from tgq_fast.report.content import AttentionMap, Example, GateStudy, Metric, Neighbour, ReportContent, RunResult

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'


def run(name: str, value: float, *beaten: str, baseline: bool = False) -> RunResult:
    values = {"HR@1": 0.0, "H@10": 0.1, "Recall@10": 0.1, "NDCG@10": 0.05, "NDCG@1": 0.0, "MRR": 0.02, "1-NN": 0.0}
    metrics = {m: Metric(value + more, value + more - 0.05, value + more + 0.05) for m, more in values.items()}
    curve = (
        {} if baseline else {"loss": (range(50), np.linspace(3, 1, 50)), "eval/HR@10": ((0, 25, 50), (0.1, 0.2, 0.3))}
    )
    facts = {} if baseline else {"connector": name}
    return RunResult(name, metrics, facts, curve, baseline, dict.fromkeys(metrics, beaten))


def full_report() -> ReportContent:
    """A report with every section; texts of the catalogue are hostile."""
    rng = np.random.default_rng(0)
    picture = figures.data_uri(Image.new("RGB", (300, 200), (10, 120, 30)))
    overlay = figures.attention_overlay(Image.new("RGB", (64, 64), (200, 10, 10)), rng.random((7, 7)))
    neighbours = [
        Neighbour("n1", picture, HOSTILE, HOSTILE, 0.9, True),
        Neighbour("n2", None, "no picture", "", 0.1, False),
    ]
    gates = GateStudy(
        "tgq",
        rng.normal(size=60),
        rng.normal(size=60) / 10,
        rng.normal(size=60) / 10,
        (0.0, 0.3),
        {name: [rng.normal(size=9), rng.normal(size=9)] for name in ("anchored", "exploratory")},
        {name: {c: rng.normal(size=9) for c in ("true", "none", "wrong")} for name in ("anchored", "exploratory")},
    )
    return ReportContent(
        title=f"Report {HOSTILE}",
        facts={"catalogue": HOSTILE},
        runs=[
            run("tgq", 0.5, HOSTILE, "zero-shot image"),
            run(HOSTILE, 0.4, "zero-shot image"),
            run("zero-shot image", 0.3, baseline=True),
        ],
        verdict=["Training helped.", HOSTILE],
        conditions={"overlay:0.3:both": [run("tgq", 0.44), run("zero-shot image", 0.12, baseline=True)]},
        examples=[Example("q", picture, HOSTILE, HOSTILE, 1, [("tgq", 1, neighbours), ("other", None, [])])],
        example_note="two queries",
        attention=[AttentionMap("q", HOSTILE, HOSTILE, picture, overlay, overlay, [("A1", overlay)], (1.5, 1.2), 0.5)],
        gates=gates,
        catalogue={"items": "2"},
        notes=[HOSTILE],
        made_by="tgq_fast",
    )
