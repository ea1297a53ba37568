"""The HTTP application: JSON under /api (its schema: /api/openapi.json), one page, health and metrics.

Nothing that a client sends names a file: items are looked up by id, pictures are those of the catalogue's items.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from tgq_fast.data import ImageLimits
from tgq_fast.data.images import load_image
from tgq_fast.errors import DependencyError, ImageError, PoolError, TGQError

try:
    from fastapi import FastAPI, HTTPException, Query, Request, Response
    from fastapi.responses import FileResponse, JSONResponse
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import BaseModel
    from starlette.datastructures import MutableHeaders
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise DependencyError("the server needs FastAPI and its company: pip install 'tgq-fast[serve]'") from error

from tgq_fast.serve import store
from tgq_fast.serve.batching import Batcher, Overloaded
from tgq_fast.serve.explain import explain
from tgq_fast.serve.pictures import SIDES, Thumbnails
from tgq_fast.serve.store import MAX_K, ServedPool, Shop, UnknownItem

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DEFAULT", "Limits", "create_app"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
_STATIC = Path(__file__).parent / "static"
_PAGE = {"/": "index.html", "/app.js": "app.js", "/style.css": "style.css"}
# The page loads nothing from anywhere else, and no other site may embed it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server.

    Attributes:
        head_seconds: time in which the request line and headers must have arrived.
        upload_bytes: size of an uploaded picture.
        upload_seconds: time in which it must have arrived.
        upload_pixels: width × height of it.
        waiting: requests that may wait for a search; more get 503.
        batch: queries that share one search.
        reload_seconds: how often the pools' folders are looked at.
    """

    head_seconds: float = 10.0
    upload_bytes: int = 16 << 20
    upload_seconds: float = 15.0
    upload_pixels: int = 40_000_000
    waiting: int = 1024
    batch: int = 64
    reload_seconds: float = 1.0


DEFAULT = Limits()


class Neighbour(BaseModel):
    """One neighbour."""

    rank: int
    score: float
    id: str
    title: str | None = None
    brand: str | None = None
    category: str | None = None
    price: float | None = None
    group_id: str | None = None
    attributes: dict[str, str] = {}
    picture: bool = False


class Neighbours(BaseModel):
    """Answer of a search: best first."""

    pool: str
    k: int
    hits: list[Neighbour]


Name = Annotated[str | None, Query(max_length=256, description="Which pool; the first one by default.")]
ItemId = Annotated[str, Query(max_length=1024, description="Id of an item.")]
Count = Annotated[int, Query(ge=1, le=MAX_K, description="Neighbours.")]
Pairs = Annotated[list[str] | None, Query(description="name=value, repeatable.")]


class _Metrics:
    def __init__(self, shop: Shop) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("tgq_requests", "Answered requests.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "tgq_request_seconds",
            "Time to answer.",
            ["path"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self.registry,
        )
        self.batches = Histogram(
            "tgq_search_batch_size",
            "Queries that shared a search.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        items = Gauge("tgq_pool_items", "Items of a pool.", ["pool"], registry=self.registry)
        reloads = Gauge("tgq_pool_reloads", "Times a pool was opened again.", ["pool"], registry=self.registry)
        stale = Gauge("tgq_pool_stale", "1 while a changed pool cannot be opened.", ["pool"], registry=self.registry)
        for name, pool in shop.pools.items():
            items.labels(name).set_function(partial(lambda p: len(p.pool), pool))
            reloads.labels(name).set_function(partial(lambda p: p.reloads, pool))
            stale.labels(name).set_function(partial(lambda p: float(p.trouble is not None), pool))


class _Observer:
    """Counts answers, adds the headers. Plain ASGI: `app.middleware("http")` runs a task and two queues per request."""

    def __init__(self, app: ASGIApp, metrics: _Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            # Not the client's words: they would be labels without end.
            path = getattr(scope.get("route"), "path", "unknown")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)


def create_app(shop: Shop, limits: Limits = DEFAULT, *, hosts: tuple[str, ...] = ()) -> FastAPI:
    """The ASGI application over an opened shop.

    Args:
        shop: pools, models, catalogue.
        limits: what a client may ask.
        hosts: names by which the server may be addressed, beside the loopback ones; "*" for any.
    """
    metrics = _Metrics(shop)
    batchers = {
        name: Batcher(
            pool.answer,
            max_batch=limits.batch,
            max_waiting=limits.waiting,
            on_batch=metrics.batches.observe,
            name=f"search {name}",
        )
        for name, pool in shop.pools.items()
    }
    # One picture at a time through the model; pictures for the page beside it.
    network = ThreadPoolExecutor(1, "model")
    pictures = ThreadPoolExecutor(2, "pictures")
    thumbnails = None if shop.catalog is None else Thumbnails(shop.catalog)

    async def in_thread(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    async def follow() -> None:
        while True:
            await asyncio.sleep(limits.reload_seconds)
            for pool in shop.pools.values():
                await in_thread(pictures, pool.refresh)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(follow())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for batcher in batchers.values():
            batcher.close()
        network.shutdown(cancel_futures=True)
        pictures.shutdown(cancel_futures=True)

    from tgq_fast import __version__

    app = FastAPI(
        title="tgq_fast",
        version=__version__,
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    allowed = ["localhost", "127.0.0.1", "[::1]", "testserver", *hosts]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*"] if "*" in hosts else allowed)
    app.add_middleware(_Observer, metrics=metrics)

    @app.exception_handler(UnknownItem)
    async def unknown(request: Request, error: UnknownItem) -> JSONResponse:
        return JSONResponse({"error": f"nothing is called {str(error.args[0])[:200]!r} here"}, 404)

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 503, headers={"Retry-After": "1"})

    @app.exception_handler(ImageError)
    async def bad_picture(request: Request, error: ImageError) -> JSONResponse:
        detail = f" ({error.detail})" if error.detail else ""
        return JSONResponse({"error": f"the picture cannot be used: {error.reason}{detail}"}, 422)

    @app.exception_handler(PoolError)
    async def damaged(request: Request, error: PoolError) -> JSONResponse:
        logger.error("%s", error)
        return JSONResponse({"error": str(error)}, 503)

    @app.exception_handler(TGQError)
    async def refused(request: Request, error: TGQError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    async def neighbours(pool: ServedPool, query: store.Query) -> JSONResponse:
        found = await batchers[pool.name].ask(query)
        hits = [{"rank": rank, "score": score} | shop.describe(name) for rank, (name, score) in enumerate(found, 1)]
        return JSONResponse({"pool": pool.name, "k": query.k, "hits": hits})

    @app.get("/api/health")
    async def health() -> JSONResponse:
        """Whether the server answers, and from what."""
        stale = {name: pool.trouble for name, pool in shop.pools.items() if pool.trouble}
        return JSONResponse(
            {
                "status": "stale" if stale else "ok",
                "pools": {name: len(pool.pool) for name, pool in shop.pools.items()},
                "catalogue": None if shop.catalog is None else len(shop.catalog),
                "trouble": stale,
            }
        )

    @app.get("/api/shop")
    async def about() -> JSONResponse:
        """Pools, guiding fields and their values: what the page offers for choice."""
        values = await in_thread(pictures, lambda: shop.values)
        pools = [
            {"name": name, "items": len(pool.pool), "dims": pool.pool.dims, "pictures": name in shop.models}
            for name, pool in shop.pools.items()
        ]
        return JSONResponse({"pools": pools, "fields": shop.fields, "values": values, "max_k": MAX_K})

    @app.get("/api/items")
    async def items(
        text: Annotated[str, Query(max_length=200, description="Words that id, title, brand or category hold.")] = "",
        where: Pairs = None,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 48,
    ) -> JSONResponse:
        """A stretch of the catalogue's items that match."""
        total, found = await in_thread(pictures, shop.browse, text, _fields(where), offset, limit)
        return JSONResponse({"total": total, "offset": offset, "items": found})

    @app.get("/api/item")
    async def item(id: ItemId) -> JSONResponse:
        """One item."""
        known = shop.item(id)
        if known is None and shop.catalog is not None:
            raise UnknownItem(id)
        return JSONResponse(shop.describe(id))

    @app.get("/api/neighbours", response_model=Neighbours)
    async def item_neighbours(id: ItemId, pool: Name = None, k: Count = 20) -> JSONResponse:
        """Exact neighbours of an item of the pool, the item itself left out."""
        return await neighbours(shop.pool(pool), store.Query(k, item=id))

    @app.post(
        "/api/search",
        response_model=Neighbours,
        openapi_extra={"requestBody": {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}},
    )
    async def search(request: Request, pool: Name = None, k: Count = 20, field: Pairs = None) -> JSONResponse:
        """Exact neighbours of a picture, sent as the body, with metadata as `field=name=value`."""
        target, fields = shop.pool(pool), _fields(field)
        data = await _body(request, limits)
        image = await in_thread(pictures, _decode, data, limits)
        vector = await in_thread(network, shop.vector, target, image, fields)
        return await neighbours(target, store.Query(k, vector=vector))

    @app.get("/api/explain")
    async def look(id: ItemId, pool: Name = None) -> JSONResponse:
        """Where the model's query streams look in an item's picture, and its gates."""
        target, known = shop.pool(pool), shop.item(id)
        if known is None:
            raise UnknownItem(id)
        model = shop.models.get(target.name)
        if model is None or known.file_name is None or shop.catalog is None:
            return JSONResponse({"reason": "needs the run of this pool and an item with a picture"})
        picture = shop.catalog.picture(known)
        return JSONResponse(await in_thread(network, lambda: explain(model, known, load_image(picture, known.id))))

    @app.get("/api/picture", response_class=Response)
    async def picture(id: ItemId, side: Annotated[int, Query(description="160, 320 or 640.")] = 320) -> Response:
        """A catalogue item's picture as a JPEG that fits a square."""
        known = shop.item(id)
        if known is None or known.file_name is None or thumbnails is None:
            raise UnknownItem(id)
        if side not in SIDES:
            raise HTTPException(422, f"side: got {side}, expected one of {', '.join(map(str, SIDES))}")
        data = await in_thread(pictures, thumbnails.get, known, side)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})

    @app.get("/metrics", include_in_schema=False)
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    def page(name: str) -> Callable[[], Awaitable[FileResponse]]:
        async def send() -> FileResponse:
            return FileResponse(_STATIC / name)

        return send

    for path, name in _PAGE.items():
        app.add_api_route(path, page(name), include_in_schema=False, response_class=FileResponse)
    return app


def _fields(pairs: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name or len(pair) > 2000:
            raise HTTPException(422, f"got {pair[:80]!r}, expected name=value")
        if name in found:
            raise HTTPException(
                422, f"got {name[:80]!r} twice, expected one value; a list has commas between its values"
            )
        found[name] = value
    return found


async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body within its limits; what is too large is not read to its end."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith(("image/", "application/octet-stream")):
        raise HTTPException(415, f"content-type: got {kind[:80]!r}, expected image/… with the picture as the body")
    length = request.headers.get("content-length", "0")
    too_large = HTTPException(413, f"the picture is larger than {limits.upload_bytes} bytes")
    if length.isdigit() and int(length) > limits.upload_bytes:
        raise too_large
    data = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            data.extend(chunk)
            if len(data) > limits.upload_bytes:
                raise too_large

    try:
        await asyncio.wait_for(read(), limits.upload_seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the picture did not arrive within {limits.upload_seconds:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended inside the picture") from None
    if not data:
        raise HTTPException(422, "the body is empty, expected a picture")
    return bytes(data)


def _decode(data: bytes, limits: Limits) -> Image.Image:
    checks = ImageLimits(max_pixels=limits.upload_pixels, max_bytes=limits.upload_bytes)
    return load_image(data, "upload", limits=checks)
