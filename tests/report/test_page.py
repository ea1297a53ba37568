"""The report page: self-contained, escaped, complete, well-formed."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_content import full_report, run

from tgq_fast.report import figures
from tgq_fast.report.content import (
    Metric,
    ReportContent,
    RunResult,
)
from tgq_fast.report.page import render


@pytest.fixture(scope="module")
def content() -> ReportContent:
    return full_report()


@pytest.fixture(scope="module")
def page(content: ReportContent) -> str:
    return render(content)


class Tags(HTMLParser):
    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def parse(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in parse(page).tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")), (tag, name, value)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "default-src 'none'" in page


def test_catalogue_text_is_escaped(page: str) -> None:
    tags = parse(page).tags
    assert not [tag for tag, _ in tags if tag == "script"]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;alert(") >= 6


def test_ids_are_unique_and_pictures_described(page: str) -> None:
    tags = parse(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("alt" in attributes for tag, attributes in tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert links <= {f"#{name}" for name in ids}


def test_hits_and_misses_are_marked_in_words(page: str) -> None:
    marks = re.findall(r'<div class="mark"><span>(.*?)</span><span class="soft">', page)
    assert [re.sub("<[^>]*>", "", mark) for mark in marks] == ["1 ✓ hit", "2"]
    assert "first positive at rank 1" in page and "no positive" in page


def test_bold_is_what_beats_every_other_beyond_the_interval(page: str, content: ReportContent) -> None:
    assert page.count('class="best"') == 4
    close = replace(content, runs=[run("tgq", 0.5, "zero-shot image"), *content.runs[1:]])
    assert 'class="best"' not in render(close)  # greatest, but not told apart from the second
    assert 'class="best"' not in render(replace(content, runs=content.runs[:1]))


def test_columns_that_say_the_same_are_left_out(page: str, content: ReportContent) -> None:
    def columns(text: str) -> list[str]:
        return re.findall(r'<th scope="col">([^<]*)</th>', text)[1:]

    assert columns(page)[:4] == ["HR@1", "H@10", "MRR", "NDCG@10"]  # not Recall@10, NDCG@1 and 1-NN
    last = content.runs[-1]
    other = replace(last, metrics={**last.metrics, "1-NN": Metric(0.9, 0.8, 1.0)})  # one row tells them apart
    assert "1-NN" in columns(render(replace(content, runs=[*content.runs[:-1], other])))


def test_the_page_begins_with_the_verdict_and_shows_neighbours_before_curves(page: str) -> None:
    places = [
        page.index(text) for text in ("<strong>Training helped.", 'id="results"', 'id="neighbours"', 'id="training"')
    ]
    assert places == sorted(places)
    assert "overlay:0.3:both" in page and "0.440" in page


def test_gate_plots_do_not_magnify_what_hardly_moves(content: ReportContent) -> None:
    assert content.gates is not None
    still = replace(
        content.gates,
        anchored=content.gates.anchored * 1e-4,
        exploratory=None,
        overlay={"anchored": [np.full(9, 1e-4), np.full(9, -1e-4)]},
        metadata={},
    )
    (agreement,), (overlay,) = figures.gates_by_agreement(still), figures.gates_by_condition(still)
    for figure in (agreement, overlay):
        assert {"0.15", "0.2"} & set(re.findall(r"<text[^>]*>([^<]*)</text>", figure))  # a tick near the quarter


def test_the_same_content_gives_the_same_bytes(page: str, content: ReportContent) -> None:
    assert render(content) == page


def test_empty_sections_are_left_out() -> None:
    page = render(ReportContent("t", {}, [RunResult("r", {})]))
    parse(page)
    assert 'id="attention"' not in page and 'id="gates"' not in page and 'id="neighbours"' not in page


def test_overlay_is_bright_where_the_weight_is() -> None:
    import base64
    import io

    weights = np.zeros((4, 4))
    weights[:2, :2] = 1.0
    uri = figures.attention_overlay(Image.new("RGB", (80, 80), (90, 90, 90)), weights)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), dtype=float)
    assert shown[:30, :30, 0].mean() > shown[50:, 50:, 0].mean() + 60
