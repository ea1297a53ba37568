"""Render a report to one HTML file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tgq_fast.report import figures
from tgq_fast.report.content import ReportContent, RunResult

__all__ = ["render", "source"]

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


def render(content: ReportContent) -> str:
    """The whole page. Every text of the catalogue is escaped; figures and pictures are part of the file."""
    environment = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["series"] = figures.series_variable
    names = _shown(content.runs)
    drawn = [figures.curves(content.runs, name, title) for name, title in _CURVES]
    gates = content.gates
    return environment.get_template("page.html.j2").render(
        content=content,
        metric_names=names,
        best={name: _sole_winner(content.runs, name) for name in names},
        style=Markup(source("page.css")),
        dots=Markup(figures.metric_dots(content.runs, _plotted(names))) if names else "",
        curves=[Markup(figure) for figure in drawn if figure],
        gate_figures=[
            Markup(figure)
            for figure in (
                (figures.gates_by_agreement(gates), figures.gates_by_condition(gates)) if gates is not None else ()
            )
            if figure
        ],
    )


def _sole_winner(runs: Sequence[RunResult], name: str) -> str | None:
    """The run that beats every other beyond the interval of their difference, if there is one."""
    return next((run.name for run in runs if len(run.beaten.get(name, ())) == len(runs) - 1 > 0), None)


def _shown(runs: Sequence[RunResult]) -> list[str]:
    """Metrics of the table, families together; recall is left out where it is H@K anyway (one positive per query)."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    shown = []
    for family in ("HR@", "H@", "Recall@", "MRR", "NDCG@", "1-NN"):
        for name in names:
            twin = name.replace("Recall", "H")
            if name.startswith(family) and not (
                family == "Recall@" and all(run.metrics.get(name) == run.metrics.get(twin) for run in runs)
            ):
                shown.append(name)
    return shown


def _plotted(names: list[str]) -> list[str]:
    """Metrics of the dot plot: the others follow these closely and stay in the table."""
    return [name for name in names if name.startswith(("HR@", "MRR"))]
