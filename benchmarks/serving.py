"""A `tgq-fast serve` process for the length of a block."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["served"]

_PATIENCE = 120.0  # seconds until it must have answered


@contextmanager
def served(pool: Path, port: int, path: str = "/api/health", **options: Any) -> Iterator[Any]:
    """Serve a pool on a loopback port, and stop the server at the end of the block.

    Args:
        pool: folder of the pool.
        port: of the server.
        path: what is asked until there is an answer.
        options: of the process, as `subprocess.Popen` takes them.

    Yields:
        The first answer, read as JSON.

    Raises:
        OSError: the server has ended, or does not answer.
    """
    command = [sys.executable, "-m", "tgq_fast", "serve", str(pool), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    try:
        yield _first_answer(server, f"http://127.0.0.1:{port}{path}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _first_answer(server: subprocess.Popen[bytes], address: str) -> Any:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.05)
