"""Render a report to one HTML file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tgq_fast.data.conditions import Condition
from tgq_fast.report import figures
from tgq_fast.report.content import ReportContent, RunResult

__all__ = ["environment", "render", "source"]

_CURVES = (
    ("loss", "training loss"),
    ("eval/HR@10", "validation HR@10"),
    ("loss/item", "InfoNCE of the item embedding"),
    ("loss/visual", "InfoNCE of the visual embedding"),
    ("loss/redundancy", "redundancy of the two streams (C_ii²)"),
    ("loss/alignment", "alignment head"),
)


def source(name: str) -> str:
    """Text of a file of this package: a template or the style."""
    return resources.files("tgq_fast.report").joinpath(name).read_text(encoding="utf-8")


def environment() -> Environment:
    """Where the templates of pages live: everything is escaped, a name that is missing is an error."""
    found = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.globals |= {
        "series": figures.series_variable,
        "style": lambda: Markup(source("page.css")),
        "words": lambda condition: Condition.parse(condition).words,
    }
    return found


def render(content: ReportContent) -> str:
    """The whole page. Every text of the catalogue is escaped; figures and pictures are part of the file."""
    names = _shown(content.runs)
    drawn = [figures.curves(content.runs, name, title) for name, title in _CURVES]
    gates = content.gates
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            content=content,
            metric_names=names,
            best={name: _sole_winner(content.runs, name) for name in names},
            dots=[Markup(figure) for figure in figures.metric_dots(content.runs, _plotted(names))],
            curves=[Markup(figure) for figure in drawn if figure],
            gate_figures=[
                Markup(figure)
                for draw in (figures.gates_by_agreement, figures.gates_by_condition)
                for figure in (draw(gates) if gates is not None else ())
            ],
        )
    )


def _sole_winner(runs: Sequence[RunResult], name: str) -> str | None:
    """The run that beats every other beyond the interval of their difference, if there is one."""
    return next((run.name for run in runs if len(run.beaten.get(name, ())) == len(runs) - 1 > 0), None)


def _shown(runs: Sequence[RunResult]) -> list[str]:
    """Metrics of the table, families together, without those that say in every row what an earlier one says: recall is
    H@K where queries have one positive, and at the first place hit rate, NDCG and 1-NN are one."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    shown: dict[tuple[float | None, ...], str] = {}
    for family in ("HR@", "H@", "Recall@", "MRR", "NDCG@", "1-NN"):
        for name in names:
            if name.startswith(family):
                values = (run.metrics.get(name) for run in runs)
                shown.setdefault(tuple(None if m is None else round(m.value, 9) for m in values), name)
    return list(shown.values())


def _plotted(names: list[str]) -> list[str]:
    """Metrics of the dot plot: the others follow these closely and stay in the table."""
    return [name for name in names if name.startswith(("HR@", "MRR"))]
