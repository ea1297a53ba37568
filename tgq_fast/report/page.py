"""Render a report to one HTML file that loads nothing from anywhere."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tgq_fast.report import figures
from tgq_fast.report.content import ReportContent

__all__ = ["render"]

_CURVES = (
    ("loss", "training loss"),
    ("loss/multimodal", "InfoNCE of the item embedding"),
    ("loss/redundancy", "redundancy (C_ii²)"),
    ("eval", "validation H@10"),
)


def _source(name: str) -> str:
    return resources.files("tgq_fast.report").joinpath(name).read_text(encoding="utf-8")


def render(content: ReportContent) -> str:
    """The whole page. Every text of the catalogue is escaped; figures and pictures are part of the file."""
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["series"] = figures.series_variable
    names = list(dict.fromkeys(name for run in content.runs for name in run.metrics))
    drawn = [figures.curves(content.runs, name, title) for name, title in _CURVES]
    gates = content.gates
    return environment.get_template("page.html.j2").render(
        content=content,
        metric_names=names,
        best={name: max(run.metrics[name].value for run in content.runs if name in run.metrics) for name in names},
        style=Markup(_source("page.css")),
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


def _plotted(names: list[str]) -> list[str]:
    """Metrics of the dot plot: hit rates, recall and MRR; NDCG follows them closely and stays in the table."""
    return [name for name in names if not name.startswith(("NDCG", "HR@"))]
