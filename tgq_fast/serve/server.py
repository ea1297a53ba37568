"""Opening what a server needs and running it."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tgq_fast.errors import ArgumentError, DependencyError
from tgq_fast.serve.app import DEFAULT, Limits, create_app
from tgq_fast.serve.store import Shop

__all__ = ["open_shop", "serve"]


def serve(
    shop: Shop,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits = DEFAULT,
    hosts: Sequence[str] = (),
    announce: Callable[[str], None] = lambda address: None,
) -> None:
    """Answer until the process is told to stop (SIGINT, SIGTERM); requests under way are finished.

    Args:
        shop: what to answer from.
        host: address to listen on; the default reaches this machine only.
        port: 0 takes a free one, which the log names.
        hosts: further names by which clients may address the server.
        announce: told the address, http://…, once the port is taken.

    Raises:
        ArgumentError: the address cannot be listened on.
        DependencyError: uvicorn is missing.
    """
    try:
        import uvicorn

        from tgq_fast.serve.connections import protocol
    except ImportError as error:
        raise DependencyError("the server needs uvicorn: pip install 'tgq-fast[serve]'") from error
    # One core answers, the others search: a search on all of them would keep everybody waiting for their answers.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - 1)))
    listener = _listen(host, port)
    names = (*hosts, host) if host not in ("0.0.0.0", "::") else tuple(hosts)
    app = create_app(shop, limits, hosts=names)
    config = uvicorn.Config(
        app,
        http=protocol(limits.head_seconds + limits.upload_seconds),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=10,
        limit_concurrency=2 * limits.waiting,
        server_header=False,
        proxy_headers=False,
    )
    # What is loaded stays: without this every full collection walks it, 0.2 s in which nobody is answered.
    gc.collect()
    gc.freeze()
    try:
        announce(describe_address(listener))
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        gc.unfreeze()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ArgumentError("host, port", f"{host}:{port}", "an address that is free", str(error)) from None
    return listener


def describe_address(listener: socket.socket) -> str:
    """http://host:port of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_shop(pools: Sequence[Path], models: Sequence[Path], catalog: Path | None) -> Shop:
    """Pools, runs and a catalogue by their folders."""
    from tgq_fast.serve.store import ServedPool
    from tgq_fast.workflow import catalog_of, open_run

    served = [ServedPool(path) for path in pools]
    first = served[0]
    return Shop(
        served,
        models=[open_run(path) for path in models],
        catalog=catalog_of(first.path, first.pool.manifest.source, catalog),
    )
