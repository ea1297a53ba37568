"""Fetching pictures from a local server that misbehaves in every way it can."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tgq_fast.data import Catalog, import_catalog
from tgq_fast.data.importers import DownloadLimits, ShopOptions
from tgq_fast.data.importers.download import Downloader


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, kind)
    return buffer.getvalue()


class Shop(ThreadingHTTPServer):
    """Counts what it is asked; paths say how it behaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.lock = threading.Lock()
        self.gate = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.agents.add(self.headers.get("User-Agent", ""))
            count = self.server.asked[self.path]
        with contextlib.suppress(OSError):  # the client hung up
            self.answer(self.path.split("?")[0].strip("/").split("/"), count)

    def send(
        self, data: bytes, code: int = 200, kind: str = "image/png", length: int | None = None, **headers: str
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if length != -1:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, path: list[str], count: int) -> None:
        what = path[0]
        if what == "good":
            self.send(picture())
        elif what == "jpeg":
            self.send(picture(kind="JPEG"), kind="application/octet-stream")
        elif what == "flaky":
            self.send(picture(), 200 if count > 2 else 503)
        elif what == "later":
            self.send(picture(), 200 if count > 1 else 429, Retry_After="0")
        elif what == "code":
            self.send(b"no", int(path[1]))
        elif what == "html":
            self.send(b"<html>not found</html>", kind="text/html")
        elif what == "liar":
            self.send(b"<html>not found</html>", kind="image/jpeg")
        elif what == "huge":
            self.send(b"", length=10**12)
        elif what == "endless":
            self.send(b"", length=-1)
            for _ in range(100_000):
                self.wfile.write(b"x" * 65536)
        elif what == "trickle":
            self.send(b"", length=100_000)
            for _ in range(1000):
                self.wfile.write(b"x")
                self.wfile.flush()
                if self.server.gate.wait(0.05):
                    return
        elif what == "silent":
            self.server.gate.wait(30)
        elif what == "short":
            self.send(picture()[:40], length=400)
        elif what == "hangup":
            self.connection.close()
        elif what == "garbage":
            self.wfile.write(b"what?\r\n\r\n")
        elif what == "loop":
            self.send(b"", 302, Location="/loop")
        elif what == "moved":
            self.send(b"", 301, Location="/good/moved")
        elif what == "file":
            self.send(b"", 302, Location="file:///etc/passwd")
        elif what == "inside":
            self.send(b"", 302, Location="http://10.0.0.1/x.png")
        else:
            self.send(b"", 404)


@pytest.fixture
def shop() -> Iterator[Shop]:
    server = Shop()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


LIMITS = DownloadLimits(
    private=True, wait=0.01, interval=0.0, timeout=0.5, total=1.0, max_bytes=1 << 20, per_host=4, failures=1000
)


def test_what_a_bad_server_does_is_a_reason_and_nothing_else(tmp_path: Path, shop: Shop) -> None:
    wanted = {
        "good/1": None, "jpeg": None, "flaky": None, "later": None, "moved": None, "good/täß chen?a=b c": None,
        "code/404": "404", "code/403": "403", "code/500": "500", "html": "text/html", "liar": "no usable picture",
        "huge": "1000000000000 bytes", "endless": "more than", "trickle": "longer than", "silent": "cannot be fetched",
        "short": "broke off", "hangup": "cannot be fetched", "garbage": "cannot be fetched", "loop": "redirects",
        "file": "no web address",
    }  # fmt: skip
    fetched = Downloader(tmp_path, LIMITS).fetch_all(f"{shop.url}/{path}" for path in wanted)
    for path, reason in wanted.items():
        got = fetched[f"{shop.url}/{path}"]
        if reason is None:
            assert isinstance(got, Path) and Image.open(got).size == (16, 12), (path, got)
        else:
            assert isinstance(got, str) and reason in got, (path, got)
    assert fetched[f"{shop.url}/jpeg"].suffix == ".jpg"  # type: ignore[union-attr]
    asked = shop.asked
    assert (asked["/code/404"], asked["/code/500"], asked["/flaky"], asked["/later"]) == (1, 3, 3, 2)
    assert asked["/huge"] == 1 and asked["/html"] == 1
    assert all(agent.startswith("tgq-fast/") for agent in shop.agents)
    assert len(list(tmp_path.iterdir())) == sum(reason is None for reason in wanted.values())


def test_what_was_fetched_is_not_fetched_again(tmp_path: Path, shop: Shop) -> None:
    addresses = [f"{shop.url}/good/{n}" for n in range(5)] * 2
    first = Downloader(tmp_path, LIMITS)
    assert len(first.fetch_all(addresses)) == 5 and first.fetched == 5
    second = Downloader(tmp_path, LIMITS)
    assert second.fetch_all(addresses) and (second.fetched, second.reused) == (0, 5)
    assert max(shop.asked.values()) == 1


def test_a_host_that_only_fails_is_left_alone(tmp_path: Path, shop: Shop) -> None:
    limits = DownloadLimits(private=True, wait=0.0, interval=0.0, timeout=1.0, failures=6, workers=1)
    got = Downloader(tmp_path, limits).fetch_all(f"{shop.url}/code/503?{n}" for n in range(50))
    assert sum(shop.asked.values()) <= 6 and "not asked again" in str(got[f"{shop.url}/code/503?49"])


def test_pace_and_how_many_at_once(tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Downloader(tmp_path, DownloadLimits(private=True, interval=0.02, workers=8, per_host=2))
    follow, lock, now, most = loader._follow, threading.Lock(), 0, 0

    def counted(address: str) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            time.sleep(0.03)
            return follow(address)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(loader, "_follow", counted)
    begin = time.monotonic()
    loader.fetch_all(f"{shop.url}/good/{n}" for n in range(10))
    assert time.monotonic() - begin >= 9 * 0.02 and most == 2


@pytest.mark.parametrize(
    "address",
    [
        *(
            "http://127.0.0.1/x",
            "http://localhost/x",
            "http://[::1]/x",
            "http://169.254.169.254/x",
            "http://10.1.2.3/x",
        ),
        *("http://0.0.0.0/x", "ftp://example.org/x", "file:///etc/passwd", "http:///x", "http://[broken/x", "nonsense"),
        "http://a:99999/x",
    ],
)
def test_addresses_that_are_not_fetched(tmp_path: Path, address: str) -> None:
    (reason,) = Downloader(tmp_path).fetch_all([address]).values()
    assert isinstance(reason, str) and ("private network" in reason or "no web address" in reason)


def test_a_redirect_into_a_private_network_is_refused(
    tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Downloader(tmp_path, DownloadLimits(attempts=1, timeout=1.0))
    real = loader._check_target
    monkeypatch.setattr(loader, "_check_target", lambda a: None if a.startswith(shop.url) else real(a))
    (reason,) = loader.fetch_all([f"{shop.url}/inside"]).values()
    assert "private network" in str(reason)


def test_an_interrupted_import_goes_on_and_lists_what_failed(
    tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["id,image"] + [f"{n},{shop.url}/good/{n}" for n in range(6)] + [f"bad,{shop.url}/code/404"]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    options = ShopOptions(limits=LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr("tgq_fast.data.importers.shop._write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_catalog("table", tmp_path / "t.csv", tmp_path / "out", options=options)
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    report = import_catalog("table", tmp_path / "t.csv", tmp_path / "out", options=options)
    assert report.items == 6 and max(shop.asked[f"/good/{n}"] for n in range(6)) == 1
    assert report.skipped == {"picture not fetched": 1} and "404" in report.examples[0]
    assert len(Catalog.load(tmp_path / "out")) == 6 and not (tmp_path / "out" / ".downloads").exists()
