"""Clients that do a server harm, or try: beside the load of `benchmarks.serve_load`."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import suppress

__all__ = ["KINDS", "Hostile"]

_HOST = b"Host: 127.0.0.1\r\n"
_PICTURE = b"POST /api/search HTTP/1.1\r\n" + _HOST + b"Content-Type: image/png\r\n"
_MEGABYTE = bytes(1 << 20)

KINDS: dict[str, tuple[bytes, str]] = {
    "64 MB announced": (_PICTURE + b"Content-Length: 67108864\r\n\r\n" + _MEGABYTE, "413"),
    "20 MB in chunks": (
        _PICTURE + b"Transfer-Encoding: chunked\r\n\r\n" + 20 * (b"100000\r\n" + _MEGABYTE + b"\r\n"),
        "413",
    ),
    "no picture": (_PICTURE + b"Content-Length: 4\r\n\r\nabcd", "422"),
    "half a body": (_PICTURE + b"Content-Length: 1000\r\n\r\nhalf", "408"),
    "wrong type": (
        b"POST /api/search HTTP/1.1\r\n" + _HOST + b"Content-Type: text/html\r\nContent-Length: 4\r\n\r\nabcd",
        "415",
    ),
    "path in an id": (b"GET /api/picture?id=../../etc/hostname HTTP/1.1\r\n" + _HOST + b"\r\n", "404"),
    "path": (b"GET /../../etc/hostname HTTP/1.1\r\n" + _HOST + b"\r\n", "404"),
    "too many neighbours": (b"GET /api/neighbours?k=99999999&id=item-1 HTTP/1.1\r\n" + _HOST + b"\r\n", "422"),
    "another site's name": (b"GET /api/health HTTP/1.1\r\nHost: shop.example\r\n\r\n", "400"),
    "200 kB of head": (
        b"GET / HTTP/1.1\r\n" + _HOST + b"X: " + bytes(200_000).replace(b"\0", b"y") + b"\r\n\r\n",
        "431",
    ),
    "half a head": (b"GET /api/health HT", "408"),
    "no HTTP": (b"\x16\x03\x01\x02 hello\r\n\r\n", "400"),
}
"""What a client sends and the status it must get."""


class Hostile:
    """A client of each kind that asks again and again, until :meth:`stop`.

    Args:
        port: of the server on the loopback address.
        pause: of a client after each answer, seconds.
        patience: how long a client waits for an answer, seconds.
    """

    def __init__(self, port: int, *, pause: float = 0.05, patience: float = 60.0) -> None:
        self._port, self._pause, self._patience = port, pause, patience
        self._got: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(name,), daemon=True) for name in KINDS]
        for thread in self._threads:
            thread.start()

    def stop(self) -> dict[str, dict[str, int]]:
        """How often which status came, by kind; a client that waits for its answer is waited for."""
        self._end.set()
        for thread in self._threads:
            thread.join()
        return {name: dict(statuses) for name, statuses in self._got.items()}

    def _ask(self, name: str) -> None:
        data = KINDS[name][0]
        while not self._end.is_set():
            answer = b""
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), self._patience) as connection:
                with suppress(OSError):  # the server may close on what it refuses
                    connection.sendall(data)
                answer = connection.recv(4096)
            words = answer.split(b" ", 2)
            self._got[name][words[1].decode() if len(words) > 1 else "none"] += 1
            time.sleep(self._pause)
