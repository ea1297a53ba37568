"""Connections on which a request must arrive in time, its head within a size.

uvicorn waits for ever and keeps what comes, so that silent, dripping or endless clients could use up every connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HEAD_BYTES", "protocol"]

HEAD_BYTES = 64 << 10


def protocol(seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's `http` protocol with bounds on the time in which a request arrives and on the size of its head.

    Args:
        seconds: from the connection, or from the first byte of a further request, to the end of its body.
    """

    class Bounded(HttpToolsProtocol):
        _late: asyncio.TimerHandle | None = None
        _head = 0  # bytes of a head that is not complete
        _inside = False  # between the head's end and the body's

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._inside:
                self._head += len(data)
            super().data_received(data)
            if not self._inside and self._head > HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._wait()

        def on_headers_complete(self) -> None:
            self._inside, self._head = True, 0
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._stop()
            self._inside = False
            super().on_message_complete()

        def _wait(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(seconds, self._refuse, b"408 Request Timeout")

        def _stop(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _refuse(self, status: bytes) -> None:
            self._stop()
            if self.transport.is_closing():
                return
            if not self._inside:  # in a body the application has been asked, and has answered or will not
                self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    return Bounded
