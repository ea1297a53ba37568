"""The HTTP application: exact answers, one version per search, and clients that misbehave."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from serve_shop import WIDTH, Painter, png, vectors, write_pool
from starlette.testclient import TestClient

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.reference import exact_topk
from tgq_fast.serve import ServedPool, Shop, create_app
from tgq_fast.serve.app import Limits
from tgq_fast.serve.batching import Batcher, Overloaded


@pytest.mark.parametrize("name", ["one", "two"])
def test_neighbours_are_exact_and_leave_the_item_out(
    client: TestClient, shop: Shop, catalog: Catalog, name: str
) -> None:
    rows = shop.pools[name].pool.embeddings()
    expected = exact_topk(rows[3:4], rows, 5, exclude=torch.tensor([3]))
    answer = client.get("/api/neighbours", params={"id": catalog.ids[3], "pool": name, "k": 5})
    assert answer.status_code == 200
    hits = answer.json()["hits"]
    assert [hit["id"] for hit in hits] == [catalog.ids[i] for i in expected.indices[0].tolist()]
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5]
    assert hits[0]["score"] == pytest.approx(float(expected.scores[0, 0]), abs=1e-6)


def test_mixed_batch_gives_each_query_its_own(shop: Shop, catalog: Catalog) -> None:
    """One search for queries of different k, by id and by vector, with an unknown id between them."""
    from tgq_fast.serve.store import Query, UnknownItem

    pool = shop.pools["one"]
    rows = pool.pool.embeddings()
    vector = vectors(1, 9)[0]
    found = pool.answer(
        [Query(2, item=catalog.ids[0]), Query(4, vector=vector), Query(3, item="nobody"), Query(1, item=catalog.ids[7])]
    )
    assert isinstance(found[2], UnknownItem)
    sizes = [len(part) for part in found if isinstance(part, list)]
    assert sizes == [2, 4, 1]
    want = exact_topk(vector[None], rows, 4)
    assert [name for name, _ in found[1]] == [catalog.ids[i] for i in want.indices[0].tolist()]  # type: ignore[union-attr]
    assert found[0] == pool.answer([Query(2, item=catalog.ids[0])])[0]


def test_picture_query_reaches_the_model_with_its_fields(shop: Shop, client: TestClient) -> None:
    shop.models["one"] = Painter()  # type: ignore[assignment]
    url = "/api/search?pool=one&k=3&field=category=a=b&field=colour=red"
    answer = client.post(url, content=png((255, 0, 51)), headers={"content-type": "image/png"})
    assert answer.status_code == 200
    query = torch.zeros(1, WIDTH)
    query[0, :4] = torch.tensor([1.0, 0.0, 0.2, 2.0])
    rows = shop.pools["one"].pool.embeddings()
    want = exact_topk(query, rows, 3)
    assert [hit["score"] for hit in answer.json()["hits"]] == pytest.approx(want.scores[0].tolist(), abs=1e-5)
    refused = client.post(url.replace("one", "two"), content=png((1, 2, 3)), headers={"content-type": "image/png"})
    assert refused.status_code == 422 and "its model" in refused.json()["error"]


def test_uploads_touch_no_disk(shop: Shop, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    shop.models["one"] = Painter()  # type: ignore[assignment]
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    answer = client.post("/api/search?pool=one", content=png((9, 9, 9)), headers={"content-type": "image/png"})
    assert answer.status_code == 200, answer.text


def test_browse_finds_words_and_fields(client: TestClient, catalog: Catalog) -> None:
    everything = client.get("/api/items", params={"limit": 200}).json()
    assert everything["total"] == len(catalog) == len(everything["items"])
    category = next(item.category for item in catalog.items if item.category)
    found = client.get("/api/items", params={"where": f"category={category}", "limit": 200}).json()
    assert [i["id"] for i in found["items"]] == [i.id for i in catalog.items if i.category == category]
    second = client.get("/api/items", params={"offset": 2, "limit": 3}).json()["items"]
    assert [item["id"] for item in second] == list(catalog.ids[2:5])
    assert client.get("/api/items", params={"text": "no such word"}).json()["total"] == 0


def test_pictures_are_small_jpegs_of_items_only(client: TestClient, catalog: Catalog) -> None:
    answer = client.get("/api/picture", params={"id": catalog.ids[0], "side": 160})
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.format == "JPEG" and max(picture.size) <= 160
    assert client.get("/api/picture", params={"id": catalog.ids[0], "side": 161}).status_code == 422
    file = catalog.items[0].file_name
    assert file is not None
    for outside in ("../../../../etc/passwd", "/etc/passwd", "metadata.jsonl", file, "..%2f..%2fetc%2fpasswd", "\0"):
        assert client.get("/api/picture", params={"id": outside}).status_code == 404
        assert client.get("/api/neighbours", params={"id": outside}).status_code == 404
        assert client.get(f"/{quote(outside)}").status_code == 404
        assert client.get(f"/static/{quote(outside, safe='')}").status_code == 404


def test_a_value_that_is_asked_for_is_read_as_a_rows_is(client: TestClient, catalog: Catalog) -> None:
    item = next(item for item in catalog.items if item.price is not None and item.category is not None)
    alike = [i.id for i in catalog.items if i.price == item.price and i.category == item.category]
    for price in (str(item.price), f"{item.price:.3f}", f" {item.price} "):
        where = [("where", f"price={price}"), ("where", f"category=  {item.category} ")]
        found = client.get("/api/items", params=[*where, ("limit", "200")]).json()
        assert [one["id"] for one in found["items"]] == alike
    assert client.get("/api/items", params={"where": "category="}).json()["total"] == 0
    assert client.get("/api/items", params={"where": "price=cheap"}).status_code == 422
    twice = client.get("/api/items", params=[("where", "category=a"), ("where", "category=b")])
    assert twice.status_code == 422 and "twice" in twice.text


@pytest.mark.parametrize(
    ("method", "url", "content", "kind", "status"),
    [
        ("GET", "/api/neighbours?id=x&k=0", b"", "", 422),
        ("GET", "/api/neighbours?id=x&k=100000", b"", "", 422),
        ("GET", "/api/neighbours", b"", "", 422),
        ("GET", "/api/neighbours?id=x&pool=three", b"", "", 404),
        ("GET", "/api/items?where=colour", b"", "", 422),
        ("POST", "/api/search", b"", "image/png", 422),
        ("POST", "/api/search", b"not a picture", "image/png", 422),
        ("POST", "/api/search", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 422),
        ("POST", "/api/search", b"a=b", "application/x-www-form-urlencoded", 415),
        ("POST", "/api/search", b"0" * 5000, "image/png", 413),
        ("POST", "/api/search", png((0, 0, 0), 200)[:150], "image/png", 422),
        ("POST", "/api/search?field=novalue", png((0, 0, 0)), "image/png", 422),
        ("PUT", "/api/search", b"", "image/png", 405),
    ],
)
def test_bad_requests_end_in_4xx(shop: Shop, method: str, url: str, content: bytes, kind: str, status: int) -> None:
    with TestClient(create_app(shop, Limits(upload_bytes=4000, upload_pixels=30_000))) as client:
        answer = client.request(method, url, content=content, headers={"content-type": kind} if kind else {})
        assert answer.status_code == status, answer.text
        assert client.get("/api/health").json()["status"] == "ok"


def test_an_upload_without_a_length_is_cut_off(shop: Shop) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        for _ in range(10_000):
            sent += 1000
            yield b"0" * 1000

    with TestClient(create_app(shop, Limits(upload_bytes=4000))) as client:
        answer = client.post("/api/search", content=endless(), headers={"content-type": "image/png"})
    assert answer.status_code == 413


def test_too_many_pixels_are_refused_before_decoding(shop: Shop) -> None:
    with TestClient(create_app(shop, Limits(upload_pixels=10_000))) as client:
        answer = client.post("/api/search", content=png((0, 0, 0), 200), headers={"content-type": "image/png"})
    assert answer.status_code == 422 and "too_large" in answer.json()["error"]


def test_a_changed_pool_is_picked_up_and_a_damaged_one_is_not(
    client: TestClient, shop: Shop, catalog: Catalog, tmp_path: Path
) -> None:
    def swap(fresh: Path) -> None:
        (tmp_path / "one").rename(tmp_path / f"old-{time.monotonic_ns()}")
        fresh.rename(tmp_path / "one")

    def wait_for(condition: Any) -> dict[str, Any]:
        for _ in range(300):
            told = client.get("/api/health").json()
            if condition(told):
                return told
            time.sleep(0.02)
        raise AssertionError(told)

    write_pool(tmp_path / "next", list(catalog.ids[:5]), 3)
    swap(tmp_path / "next")
    wait_for(lambda told: told["pools"]["one"] == 5)
    assert client.get("/api/neighbours", params={"id": catalog.ids[7], "pool": "one"}).status_code == 404
    (tmp_path / "one" / "manifest.json").write_text("{")
    told = wait_for(lambda told: told["status"] == "stale")
    assert told["pools"]["one"] == 5
    assert client.get("/api/neighbours", params={"id": catalog.ids[0], "pool": "one", "k": 2}).status_code == 200
    assert 'tgq_pool_stale{pool="one"} 1.0' in client.get("/metrics").text
    for path in (tmp_path / "one").glob("*.safetensors"):
        path.unlink()
    lost = client.get("/api/neighbours", params={"id": catalog.ids[0], "pool": "one"})
    assert lost.status_code == 503 and "missing" in lost.json()["error"]


def test_headers_schema_and_metrics(client: TestClient, catalog: Catalog) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("index.html", "app.js", "style.css"):
        text = (Path(__file__).parents[2] / "tgq_fast" / "serve" / "static" / name).read_text()
        assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    paths = client.get("/api/openapi.json").json()["paths"]
    assert {"/api/neighbours", "/api/search", "/api/items", "/api/picture", "/api/explain", "/api/health"} <= set(paths)
    client.get("/api/neighbours", params={"id": catalog.ids[0]})
    client.get("/made/up/path")
    text = client.get("/metrics").text
    assert 'tgq_requests_total{path="/api/neighbours",status="200"} 1.0' in text
    assert "made" not in text
    assert client.get("/api/health", headers={"host": "evil.example"}).status_code == 400


def test_shop_refuses_what_does_not_fit(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="at least one pool"):
        Shop([])
    with pytest.raises(ArgumentError, match="different names"):
        Shop([ServedPool(tmp_path / "one"), ServedPool(tmp_path / "two", name="one")])
    with pytest.raises(PoolError, match="not an item pool"):
        ServedPool(tmp_path / "nothing")


def test_batcher_joins_what_waits_and_refuses_beyond_its_bound() -> None:
    free, sizes = threading.Event(), []

    def answer(jobs: Any) -> list[Any]:
        free.wait(10)
        sizes.append(len(jobs))
        return [ValueError("odd") if job % 2 else job * 10 for job in jobs]

    async def run() -> list[Any]:
        batcher: Batcher[int, int] = Batcher(answer, max_batch=4, max_waiting=6)
        first = asyncio.create_task(batcher.ask(0))
        while batcher._queue:  # until the thread has it
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        rest = [asyncio.create_task(batcher.ask(i)) for i in range(1, 7)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await batcher.ask(99)
        rest[0].cancel()
        free.set()
        found = await asyncio.gather(first, *rest, return_exceptions=True)
        batcher.close()
        with pytest.raises(Overloaded):
            await batcher.ask(1)
        return list(found)

    found = asyncio.run(run())
    assert sizes[0] == 1 and max(sizes) <= 4 and sum(sizes) == 6  # the cancelled one is not asked
    assert found[0] == 0 and isinstance(found[1], asyncio.CancelledError)
    assert found[2] == 20 and isinstance(found[3], ValueError) and found[4] == 40
