"""The pages of a report and of a study in a real headless Chromium: phone width, dark mode, keyboard, no request."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_content import full_report

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tgq_fast.report.page import render
from tgq_fast.study.page import write_page

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "further" / "fashion_zoo.json"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(render(full_report()), encoding="utf-8")
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")), folder / "study.html")
    return {name: folder / f"{name}.html" for name in ("report", "study")}


@pytest.fixture(params=["report", "study"])
def page(request: pytest.FixtureRequest, window: Any, pages: dict[str, Path]) -> Any:
    window.get_log("performance")
    window.get(pages[request.param].as_uri())
    yield window
    window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert not [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"]


def show(page: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = np.array([float(v) for v in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_nothing_leaves_the_page_and_nothing_is_asked_for(page: Any) -> None:
    page.execute_script("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    sent = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [page.current_url]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_overflows_the_window(page: Any, width: int, scheme: str) -> None:
    """But for tables, which scroll in their own card and say so."""
    show(page, width, scheme)
    whole, seen = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert whole <= seen == width
    beyond = page.execute_script(
        "return [...document.querySelectorAll('main *, header *, footer *')]"
        ".filter(e => !e.closest('.scroll, svg, .word') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert not beyond
    cut = page.execute_script(
        "return [...document.querySelectorAll('td, th')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => e.textContent)"
    )
    assert not cut
    unreachable = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth && (e.tabIndex < 0"
        " || !e.getAttribute('aria-label'))).length"
    )
    assert unreachable == 0


def test_tables_of_a_desktop_are_seen_whole(page: Any) -> None:
    show(page, 1200, "light")
    wide = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => e.getAttribute('aria-label'))"
    )
    assert not wide


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_ground(page: Any, scheme: str) -> None:
    """WCAG 2 AA: a contrast of 4.5 for every text, whatever lies under it."""
    show(page, 1200, scheme)
    pairs = page.execute_script(
        """
        const ground = node => {
          for (; node; node = node.parentElement) {
            const colour = getComputedStyle(node).backgroundColor;
            if (!/, 0\\)|transparent/.test(colour)) return colour;
          }
          return 'rgb(255, 255, 255)';
        };
        const found = new Map();
        for (const node of document.querySelectorAll('body *:not(svg *)')) {
          if (![...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())) continue;
          const pair = [getComputedStyle(node).color, ground(node)];
          found.set(pair.join('|'), [...pair, node.outerHTML.slice(0, 60)]);
        }
        return [...found.values()];
        """
    )
    assert len(pairs) >= 3
    for ink, paper, where in pairs:
        dark, light = sorted((luminance(ink), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper, where)
    assert (luminance(page.execute_script("return getComputedStyle(document.body).backgroundColor")) < 0.1) == (
        scheme == "dark"
    )


def test_the_keyboard_reaches_everything_and_is_seen_there(page: Any) -> None:
    show(page, 1200, "light")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    first = page.switch_to.active_element
    assert first.get_attribute("class") == "skip" and first.rect["x"] >= 0
    wanted = page.execute_script("return document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    reached = set()
    for _ in range(wanted + 1):
        active = page.switch_to.active_element
        if active.tag_name == "body":
            break
        reached.add(active.id)
        style = page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", active)
        assert style != "none" or active.get_attribute("class") == "skip"
        active.send_keys(Keys.TAB)
    assert len(reached) == wanted
    first.send_keys(Keys.ENTER)
    assert page.current_url.endswith(first.get_attribute("href").rpartition("/")[2])


def test_pictures_of_a_phone_are_in_columns_of_one_size(window: Any, pages: dict[str, Path]) -> None:
    window.get(pages["report"].as_uri())
    show(window, 360, "light")
    sizes = window.execute_script(
        "return [...document.querySelectorAll('.row .pic')].map(e => [e.clientWidth, e.clientHeight])"
    )
    assert sizes and all(80 <= width == height for width, height in sizes)
    marks = window.execute_script("return [...document.querySelectorAll('.mark')].map(e => e.clientHeight)")
    assert max(marks) < 30  # place, hit and score stay on one line
    window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
