"""The page in a real headless Chromium: browse, items by click and keyboard, pictures, phone width, dark mode."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("selenium")
import uvicorn
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.pool import ItemPool
from tgq_fast.serve import ServedPool, Shop, create_app


class Painter:
    """Stands in for a model: each picture is embedded as the first item of the pool."""

    class config:
        fields = ("category",)
        connector = "mlp"

    def __init__(self, row: torch.Tensor) -> None:
        self.row = row
        self.asked: list[dict[str, str]] = []

    def encode(self, images: list[Image.Image], *, fields: list[dict[str, str]]) -> torch.Tensor:
        self.asked += fields
        return self.row[None].clone()


class Site:
    """A running server and what it answers from."""

    def __init__(self, folder: Path) -> None:
        self.catalog = Catalog.load(write_demo_catalog(folder / "shop", groups=20, variants=3, image_size=64))
        generator = torch.Generator().manual_seed(0)
        for name in ("one", "two"):
            with ItemPool.create(folder / name, dims=8) as pool:
                pool.append(list(self.catalog.ids), torch.randn(len(self.catalog), 8, generator=generator))
        pools = [ServedPool(folder / "one"), ServedPool(folder / "two")]
        self.shop = Shop(pools, catalog=self.catalog)
        self.model = Painter(pools[0].pool.embeddings()[0])
        self.shop.models["one"] = self.model  # type: ignore[assignment]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.server = uvicorn.Server(uvicorn.Config(create_app(self.shop), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened = Site(tmp_path_factory.mktemp("page"))
    yield opened
    opened.close()


@pytest.fixture
def page(window: Any, site: Site) -> Any:
    window.get("about:blank")
    window.get(site.url)
    wait(lambda: cards(window))
    yield window
    complaints = [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"]
    assert not complaints


def wait(condition: Callable[[], Any], seconds: float = 15) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing within the time"
        time.sleep(0.05)
    return found


def cards(page: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#results .card p:first-of-type')].map(n => n.textContent)"
    return list(page.execute_script(script))


def status(page: Any) -> str:
    return str(page.find_element(By.ID, "status").text)


def label(site: Site, item_id: str) -> str:
    item = site.catalog.items[site.catalog.index(item_id)]
    return item.title or item.id


def test_browse_more_and_search_by_words(page: Any, site: Site) -> None:
    assert len(cards(page)) == 48 and status(page) == f"48 of {len(site.catalog)} items"
    page.find_element(By.ID, "more").click()
    wait(lambda: len(cards(page)) == len(site.catalog))
    assert not page.find_element(By.ID, "more").is_displayed()
    page.find_element(By.TAG_NAME, "body").send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "text"
    page.switch_to.active_element.send_keys("zebra crossing")
    wait(lambda: status(page) == "No item matches.")


def test_item_by_click_shows_exact_neighbours_and_back_returns(page: Any, site: Site) -> None:
    first = site.catalog.ids[0]
    page.find_element(By.CSS_SELECTOR, ".card").click()
    wait(lambda: page.find_element(By.ID, "focus").is_displayed())
    pool = site.shop.pools["one"].pool
    hits = pool.search(pool.get([first]), 24, exclude_ids=[first]).ids[0]
    wait(lambda: len(cards(page)) == 24)
    assert cards(page) == [label(site, str(name)) for name in hits]
    assert page.title == label(site, first)
    page.back()
    wait(lambda: len(cards(page)) == 48)


def test_keyboard_alone_reaches_an_item_and_leaves_it(page: Any, site: Site) -> None:
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("class") == "skip"
    for _ in range(30):
        if "card" in (page.switch_to.active_element.get_attribute("class") or ""):
            break
        page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    wait(lambda: page.find_element(By.ID, "focus").is_displayed())
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    wait(lambda: not page.find_element(By.ID, "focus").is_displayed() and len(cards(page)) == 48)


def test_two_pools_side_by_side(page: Any) -> None:
    page.find_element(By.CSS_SELECTOR, ".card").click()
    wait(lambda: page.find_element(By.ID, "focus").is_displayed())
    Select(page.find_element(By.ID, "pool-b")).select_by_value("two")
    wait(lambda: len(page.find_elements(By.CSS_SELECTOR, ".sides.two > div")) == 2)
    assert len(cards(page)) == 48
    Select(page.find_element(By.ID, "pool-b")).select_by_value("")
    wait(lambda: len(cards(page)) == 24)


def test_picture_is_searched_with_the_fields(page: Any, site: Site, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (9, 99, 199)).save(tmp_path / "mine.png")
    page.find_element(By.CSS_SELECTOR, "#filters summary").click()
    value = site.catalog.items[site.catalog.index(next(i.id for i in site.catalog.items if i.category))].category
    page.find_element(By.CSS_SELECTOR, "#fields input").send_keys(value)
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "mine.png"))
    wait(lambda: status(page) == "Neighbours of your picture")
    assert site.model.asked[-1] == {"category": value}
    assert cards(page)[0] == label(site, site.catalog.ids[0])
    time.sleep(0.4)  # the typed field must not bring the catalogue back (a browse waits 200 ms for more typing)
    assert status(page) == "Neighbours of your picture"
    box = page.find_element(By.CSS_SELECTOR, "#fields input")
    box.clear()
    box.send_keys("other", Keys.TAB)
    wait(lambda: site.model.asked[-1] == {"category": "other"})
    wait(lambda: status(page) == "Neighbours of your picture")
    (tmp_path / "bad.png").write_bytes(b"no picture at all")
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "bad.png"))
    wait(lambda: "cannot be used" in status(page))
    page.get_log("browser")  # the refused request is logged there, rightly


def test_dropped_picture_is_searched(page: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (1, 2, 3)).save(buffer, "PNG")
    page.execute_script(
        """
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(arguments[0])], "drop.png", {type: "image/png"}));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        """,
        list(buffer.getvalue()),
    )
    wait(lambda: status(page) == "Neighbours of your picture")


def test_phone_width_and_dark_mode(page: Any) -> None:
    def background() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = background()
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert background() != light
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.find_element(By.CSS_SELECTOR, ".card").click()
        wait(lambda: page.find_element(By.ID, "focus").is_displayed())
        wide, seen = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= seen == 360
        shot = page.find_element(By.CSS_SELECTOR, ".card .shot").rect
        assert abs(shot["width"] - shot["height"]) <= 1
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_is_loaded_from_elsewhere(page: Any, site: Site) -> None:
    names = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.startswith((site.url, "data:")) for name in names)
