"""The server itself: slow and vanished clients, many at once, its process."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
import uvicorn

from tgq_fast.data import Catalog
from tgq_fast.pool import ItemPool
from tgq_fast.serve import Shop, create_app
from tgq_fast.serve.app import Limits
from tgq_fast.serve.connections import HEAD_BYTES, protocol
from tgq_fast.serve.store import ServedPool


@pytest.fixture
def running(shop: Shop) -> Any:
    """A real server on a loopback port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(shop, Limits(upload_seconds=0.5)), log_level="error", http=protocol(1.5))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(20)
    listener.close()
    assert not thread.is_alive()


def talk(port: int, sent: bytes, *, shut: bool = False) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        return connection.recv(4096)


def test_slow_half_and_vanished_uploads_harm_nobody(running: int) -> None:
    head = (
        b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nhalf"
    )
    assert b" 408 " in talk(running, head)
    talk(running, head, shut=True)
    for _ in range(20):  # gone at once
        connection = socket.create_connection(("127.0.0.1", running), timeout=10)
        connection.sendall(head)
        connection.close()
    lying = head.replace(b"1000", b"99999999999")
    assert b" 413 " in talk(running, lying)
    assert b" 400 " in talk(running, b"\x16\x03\x01 nonsense\r\n\r\n")
    assert b" 200 " in talk(running, b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n")


def test_silent_dripping_and_endless_heads_are_ended(running: int) -> None:
    """They would hold a connection for ever, or fill the memory."""
    line = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n"
    assert b" 408 " in talk(running, b"")
    assert b" 408 " in talk(running, line)
    assert b" 431 " in talk(running, line + b"X-More: " + b"a" * HEAD_BYTES)
    with socket.create_connection(("127.0.0.1", running), timeout=10) as connection:  # answered, but drips a body
        connection.sendall(line + b"Content-Length: 100000\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 8:
                connection.sendall(b".")
                time.sleep(0.05)
        assert time.monotonic() - began < 5
    with socket.create_connection(("127.0.0.1", running), timeout=10) as connection:  # several requests, many bytes
        for _ in range(3):
            connection.sendall(line + b"X-More: " + b"a" * (HEAD_BYTES // 2) + b"\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}}"):
                answer += connection.recv(4096)
            assert b" 200 " in answer


def test_server_leaves_a_core_and_what_is_loaded_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it collections walk every loaded module, 0.2 s, and searches take the core that answers."""
    import gc

    from tgq_fast.serve import serve

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before, seen = torch.get_num_threads(), []

    def announce(address: str) -> None:
        seen.extend((gc.get_freeze_count(), torch.get_num_threads()))
        raise KeyboardInterrupt

    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            serve(shop, port=0, announce=announce)
    finally:
        torch.set_num_threads(before)
    assert seen[0] > 10_000 and seen[1] == 1
    assert gc.get_freeze_count() < seen[0]


def test_many_clients_get_the_answers_of_one(running: int, catalog: Catalog) -> None:
    import json
    import urllib.request

    def ask(number: int) -> Any:
        url = f"http://127.0.0.1:{running}/api/neighbours?id={catalog.ids[number % len(catalog)]}&k={1 + number % 7}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.loads(answer.read())["hits"]

    from concurrent.futures import ThreadPoolExecutor

    alone = [ask(number) for number in range(48)]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(48))) == alone


def test_server_process_stops_at_a_signal(shop: Shop, tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "tgq_fast", "serve", str(tmp_path / "one"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        port = int(line.split("127.0.0.1:")[1].split()[0])
        for _ in range(200):
            try:
                assert b" 200 " in talk(port, b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                break
            except OSError:
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_a_pool_is_asked_before_anybody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pool"
    ItemPool.create(path, dims=4).close()
    asked: list[int] = []
    search = ItemPool.search
    monkeypatch.setattr(ItemPool, "search", lambda pool, *given: asked.append(len(pool)) or search(pool, *given))
    served = ServedPool(path)
    assert asked == []  # an empty one has nothing to load
    with ItemPool.open(path, mode="a") as pool:
        pool.append(["a", "b"], torch.eye(2, 4))
    assert served.refresh() and asked == [2] and len(served.pool) == 2
    ServedPool(path)
    assert asked == [2, 2]
