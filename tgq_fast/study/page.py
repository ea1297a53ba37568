"""A study as a page and as text, from nothing but its study.json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgq_fast.io.files import write_atomic
from tgq_fast.report.page import environment
from tgq_fast.report.readme import beats_all
from tgq_fast.study.plan import Plan

__all__ = ["text_table", "verdict", "write_page"]

Study = Mapping[str, Any]


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def headline(study: Study) -> str:
    """The metric that a study speaks of first: H@100, or the H@K of its largest K."""
    names = [name for name in study["metrics"] if name.startswith("H@")]
    return str(names[-1])


def _relative(cell: Mapping[str, Any]) -> str:
    """By how much, with interval; nothing of what is compared with 0."""
    shares = [cell[name] for name in ("relative", "relative_low", "relative_high")]
    return "" if None in shares else "{:+.1%} [{:+.1%}, {:+.1%}], ".format(*shares)


def verdict(study: Study) -> list[str]:
    """In words: the main row against the best of the others, over all conditions and clean, and where it loses."""
    main, metric = study["main"], headline(study)
    rivals = {name: row for name, row in study["rows"].items() if name != main and not row["facts"].get("ablation")}
    if not rivals:
        return [f"{main} has nothing to be compared with."]
    lines = []
    for place, where in (("all", "averaged over all conditions"), ("clean", "on clean pictures")):
        if place not in study["rows"][main]["metrics"]:
            continue
        best = max(rivals, key=lambda name: rivals[name]["metrics"][place][metric]["value"])
        cell, mine = rivals[best]["against"][place][metric], study["rows"][main]["metrics"][place][metric]["value"]
        theirs = rivals[best]["metrics"][place][metric]["value"]
        word = {"win": "is better than", "tie": "cannot be told from", "loss": "is worse than"}[cell["verdict"]]
        lines.append(
            f"{main} {word} the best of the others, {best}, {where}: {metric} {mine:.3f} against {theirs:.3f}, "
            f"{_relative(cell)}{_p(cell['p'])}."
        )
    losses = [
        f"{name} {place} {m} ({cell['difference']:+.3f})"
        for name, row in rivals.items()
        for place in study["conditions"]
        for m, cell in row["against"][place].items()
        if cell["verdict"] == "loss"
    ]
    if losses:
        lines.append(f"Cells in which {main} is worse beyond its interval: " + "; ".join(losses) + ".")
    else:
        lines.append(f"In no cell is {main} worse than any other row beyond its interval.")
    return lines


def text_table(study: Study, metric: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one metric, clean and averaged over conditions: what a terminal has room for.

    Single conditions and intervals are in study.json and on the page. A star where the main row wins beyond the paired
    interval, a minus where it loses.
    """
    metric = metric or headline(study)
    places = ["clean", *study["pooled"]] if study["pooled"] else list(study["conditions"])
    rows = []
    for name, row in study["rows"].items():
        cells = []
        for place in places:
            found = row["metrics"][place][metric]
            mark = (
                {"win": " *", "loss": " -", "tie": ""}[row["against"][place][metric]["verdict"]]
                if "against" in row
                else ""
            )
            cells.append(f"{found['value']:.3f}{mark}")
        rows.append([name, *cells])
    return [metric, *places], rows


def command(plan: Mapping[str, Any]) -> str:
    """The command line of a study, but for folders, jobs and cache: what differs from the defaults is named."""
    given: list[tuple[str, Any]] = [("--connectors", ",".join(plan["connectors"])), ("--seeds", plan["seeds"])]
    given += [("--fields", ",".join(plan["fields"])), ("--corruptions", ",".join(plan["conditions"]))]
    if plan.get("ablations"):
        given.append(("--ablations", ",".join(plan["ablations"])))
    if len(plan["recipes"]) > 1 or any(plan["recipes"].values()):
        texts = {
            name: ",".join(f"{key}={value}" for key, value in made.items()) for name, made in plan["recipes"].items()
        }
        given += [("--recipe", f"{name}:{text}") for name, text in texts.items()]
        given += [("--folds", plan["folds"]), ("--select", plan["select"])]
    given += [("--set", f"{key}={value}") for key, value in plan["overrides"].items()]
    given += [("--preset", plan["preset"]), ("--batch-size", plan["batch_size"]), ("--lr", plan["lr"])]
    given += [("--epochs", plan["epochs"])] * (plan["epochs"] is not None)
    validations = plan.get("validations", Plan.validations)  # studies of before do not name it
    given += [("--validations", validations)] * (validations != Plan.validations)
    views = plan["views"]
    given.append(("--views", 0 if views is None else views.get("per_item", 4)))
    if views and views.get("kinds"):
        given.append(("--view-kinds", ",".join(f"{name}={weight}" for name, weight in views["kinds"].items())))
    given.append(("--seed", plan["seed"]))
    words = ["tgq-fast", "study", str(plan["catalog"]), *(str(part) for pair in given for part in pair)]
    return shlex.join(words + ["--bf16"] * bool(plan["bf16"]))


def write_page(study: Study, out: Path) -> None:
    """The whole study on one page that loads nothing from anywhere."""
    page = (
        environment()
        .get_template("study.html.j2")
        .render(
            study=study,
            verdict=verdict(study),
            headline=headline(study),
            command=command(study["plan"]),
            chance=_p,
            best=lambda place, metric: beats_all(study, place, metric),
        )
    )
    write_atomic(out, page.encode())
