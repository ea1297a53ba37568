"""Figures of the report: inline SVG that follows the page's light or dark colours, and picture data URIs."""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from tgq_fast.report.content import GateStudy, RunResult

__all__ = ["attention_overlay", "curves", "data_uri", "gates_by_agreement", "gates_by_condition", "metric_dots"]

# Colours of the drawing are replaced by style variables of the page, so that one figure serves both colour schemes.
_INK, _FAINT = "#010101", "#020202"
_SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006", "#0a0007")
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--line)"} | {c: f"var(--s{i + 1})" for i, c in enumerate(_SERIES)}
ANCHORED, EXPLORATORY = _SERIES[0], _SERIES[1]

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tgq_fast",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def series_variable(number: int) -> str:
    """CSS variable of the n-th run's colour."""
    return _VARIABLES[_SERIES[number % len(_SERIES)]]


def _svg(figure: Figure, label: str) -> str:
    """Inline SVG with an accessible label, without fixed size."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    safe = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    text = f'<svg role="img" aria-label="{safe}" {box.group(0) if box else ""} xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # Ids must be unique over all figures of a page.
    prefix = f"f{zlib.crc32(label.encode()):08x}-"
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", text)
    return re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}\1"', text)


def metric_dots(runs: Sequence[RunResult], names: Sequence[str]) -> list[str]:
    """A dot plot of each metric, with intervals, one row per run."""
    return [_dots(runs, name) for name in names if any(name in run.metrics for run in runs)]


def _dots(runs: Sequence[RunResult], name: str) -> str:
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.7, 0.26 * len(runs) + 0.7), layout="constrained")
        axes = figure.subplots()
        for y, run in enumerate(runs):
            metric = run.metrics.get(name)
            if metric is not None:
                colour = _SERIES[y % len(_SERIES)]
                axes.plot([metric.low, metric.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
                axes.plot(metric.value, y, marker="o", color=colour, markersize=6)
                axes.text(metric.high + 0.04, y, f"{metric.value:.3f}", va="center", fontsize=8.5)
        axes.set_title(name)
        axes.set_yticks(range(len(runs)), [_short(run.name) for run in runs])
        axes.set_xlim(0, 1.2)
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "", "0.5", "", "1"))
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        return _svg(figure, f"{name} with intervals for " + ", ".join(run.name for run in runs))


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def curves(runs: Sequence[RunResult], name: str, title: str) -> str | None:
    """One logged quantity of every run against the step; None when no run logged it twice."""
    drawn = [(n, run.curves[name]) for n, run in enumerate(runs) if len(run.curves.get(name, ((),))[0]) > 1]
    if not drawn:
        return None
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.6))
        axes = figure.subplots()
        for number, (steps, values) in drawn:
            colour = _SERIES[number % len(_SERIES)]
            if len(steps) > 30:
                axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
                axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=runs[number].name)
            else:
                marker = "o" if len(steps) < 10 else None
                axes.plot(
                    steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=runs[number].name
                )
        axes.set_title(title)
        axes.set_xlabel("step")
        return _svg(figure, f"{title} against training step for " + ", ".join(runs[n].name for n, _ in drawn))


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centred running mean over a tenth of the curve."""
    array = np.asarray(values, dtype=float)
    half = max(1, len(array) // 20)
    sums = np.concatenate(([0.0], np.cumsum(array)))
    at = np.arange(len(array))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(array))
    return (sums[high] - sums[low]) / (high - low)


_LEAST_GATE = 0.25  # half of the range that gate plots show at least: automatic limits make noise look like a reaction


def gates_by_agreement(study: GateStudy) -> list[str]:
    """A histogram of per item mean gates by third of agreement for each stream that has gates."""
    panels = [("anchored", study.anchored, ANCHORED), ("exploratory", study.exploratory, EXPLORATORY)]
    known = np.isfinite(study.agreement)
    varied = bool(known.any()) and float(np.ptp(study.agreement[known])) > 1e-6
    groups: list[tuple[str, np.ndarray]] = [("all items", np.ones(len(study.agreement), bool))]
    if varied and known.sum() >= 9:
        low, high = np.quantile(study.agreement[known], (1 / 3, 2 / 3))
        groups = [
            ("low agreement", known & (study.agreement <= low)),
            ("middle", known & (study.agreement > low) & (study.agreement <= high)),
            ("high agreement", known & (study.agreement > high)),
        ]
    return [_histogram(stream, values, colour, groups) for stream, values, colour in panels if values is not None]


def _histogram(stream: str, values: np.ndarray, colour: str, groups: Sequence[tuple[str, np.ndarray]]) -> str:
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.8))
        axes = figure.subplots()
        reach = max(_LEAST_GATE, 1.05 * float(np.abs(values).max()))
        bins = np.linspace(-reach, reach, 41).tolist()
        for alpha, style, (label, mask) in zip((1.0, 0.75, 0.5), ("-", "--", ":"), groups):
            if mask.any():
                axes.hist(
                    values[mask],
                    bins=bins,
                    histtype="step",
                    color=colour,
                    alpha=alpha,
                    linestyle=style,
                    linewidth=1.7,
                    label=f"{label} (n={int(mask.sum())})",
                )
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"{stream} gate, mean over channels")
        axes.set_xlabel("closed ← gate → amplified")
        axes.set_ylabel("items")
        axes.legend(fontsize=8)
        return _svg(figure, f"Histogram of the mean {stream} gate by agreement")


def gates_by_condition(study: GateStudy) -> list[str]:
    """Mean gates against overlay level, and against true, missing or wrong metadata, as far as they were measured."""
    drawn = []
    if study.overlay:
        ticks = [f"{level:.0%}" for level in study.overlay_levels]
        drawn.append(_condition("overlay on the picture", "share of the picture covered", ticks, study.overlay))
    if study.metadata:
        ticks = list(next(iter(study.metadata.values())))
        groups = {stream: [values[name] for name in ticks] for stream, values in study.metadata.items()}
        drawn.append(_condition("metadata of the item", "", ticks, groups))
    return drawn


def _condition(title: str, axis: str, ticks: Sequence[str], groups: Mapping[str, Sequence[np.ndarray]]) -> str:
    colours = {"anchored": ANCHORED, "exploratory": EXPLORATORY}
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.8))
        axes = figure.subplots()
        for shift, (stream, values) in zip((-0.09, 0.09), groups.items()):
            x = np.arange(len(values)) + shift
            middle = np.array([np.median(v) for v in values])
            low = np.array([np.quantile(v, 0.1) for v in values])
            high = np.array([np.quantile(v, 0.9) for v in values])
            axes.errorbar(
                x,
                middle,
                yerr=[middle - low, high - middle],
                color=colours[stream],
                marker="o",
                markersize=5,
                linewidth=1.6 if axis else 0,  # a line only along a scale
                elinewidth=1.2,
                capsize=3,
                label=f"{stream} gate",
            )
        axes.axhline(0, color=_INK, linewidth=0.8)
        reach = max(_LEAST_GATE, *(1.05 * float(np.abs(v).max()) for values in groups.values() for v in values))
        axes.set_ylim(-reach, reach)
        axes.set_xticks(np.arange(len(ticks)), ticks)
        axes.set_title(title)
        axes.set_xlabel(axis)
        axes.set_ylabel("mean gate (median, 10–90 %)")
        axes.legend(fontsize=8)
        return _svg(figure, f"Mean gates by {title}")


def data_uri(image: Image.Image, *, side: int = 176, quality: int = 82) -> str:
    """JPEG data URI of a picture whose longer side is at most `side` pixels; metadata of the file is not kept."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def attention_overlay(image: Image.Image, weights: np.ndarray, *, side: int = 176) -> str:
    """Data URI of a picture under a heat map.

    Args:
        image: RGB picture.
        weights: [h, w] attention over the grid of visual tokens, of any scale.
        side: longer side of the result in pixels.
    """
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    span = float(np.ptp(weights))
    scaled = (weights - weights.min()) / span if span > 0 else np.zeros_like(weights)
    heat = Image.fromarray((scaled * 255).astype(np.uint8)).resize(small.size, Image.Resampling.BICUBIC)
    strength = np.asarray(heat, dtype=np.float32)[..., None] / 255  # [H, W, 1]
    grey = np.asarray(small.convert("L"), dtype=np.float32)[..., None].repeat(3, axis=2)
    ground = grey * 0.55 + 60
    colour = _heat(strength[..., 0])
    mixed = ground * (1 - 0.8 * strength) + colour * (0.8 * strength)
    return data_uri(Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)), side=side)


def _heat(x: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1] → [H, W, 3] of a perceptually even colour map."""
    from matplotlib import colormaps

    return np.asarray(colormaps["plasma"](0.15 + 0.85 * x))[..., :3] * 255
