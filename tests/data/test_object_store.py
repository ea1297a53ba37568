"""Catalogues in S3, by Arrow's own client, from the server of `pip install moto[server]`; skipped without it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_streams import COUNT, WRITERS, check, picture

from tgq_fast.data import Catalog, import_catalog, load_image
from tgq_fast.errors import CatalogError, ImageError
from tgq_fast.io import places
from tgq_fast.pool import ItemPool, embed_catalog

SERVER = os.environ.get("TGQ_MOTO_SERVER") or shutil.which("moto_server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="no moto_server; pip install 'moto[server]'")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(SERVER), "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    for name, value in {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
                        "AWS_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    places._system.cache_clear()
    name = f"b{abs(hash(request.node.name))}"
    put(endpoint, name, b"")
    yield name
    places._system.cache_clear()


def put(endpoint: str, path: str, data: bytes) -> None:
    """The server asks for no signature."""
    kind = {"Content-Type": "application/octet-stream"}  # as a form it would be read twice
    request = urllib.request.Request(f"{endpoint}/{path}", data=data, method="PUT", headers=kind)
    urllib.request.urlopen(request, timeout=60).close()


def upload(endpoint: str, folder: Path, to: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            put(endpoint, f"{to}/{path.relative_to(folder).as_posix()}", path.read_bytes())


class Bytes:
    """Embeds the sum of a picture's pixels."""

    def encode(self, items: Catalog, *, batch_size: int, on_error: str) -> torch.Tensor:
        return torch.tensor([[float(sum(load_image(items.picture(i), i.id).tobytes()))] for i in items.items])


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_shards_in_a_bucket_are_the_catalogue_of_the_same_files(
    kind: str, endpoint: str, bucket: str, tmp_path: Path
) -> None:
    for part in range(3):
        WRITERS[kind](tmp_path / "shop" / f"part-{part}.{kind}", range(4 * part, 4 * part + 4))
    upload(endpoint, tmp_path / "shop", f"{bucket}/shop")
    there = Catalog.load(f"s3://{bucket}/shop")
    check(there, list(range(COUNT)))
    assert there.digest() == Catalog.load(tmp_path / "shop").digest()
    check(Catalog.load([f"s3://{bucket}/shop/part-{part}.{kind}" for part in (2, 0)]), [8, 9, 10, 11, 0, 1, 2, 3])
    source = "webdataset" if kind == "tar" else "parquet"
    assert import_catalog(source, f"s3://{bucket}/shop", tmp_path / "imported").items == COUNT
    check(Catalog.load(tmp_path / "imported"), list(range(COUNT)))
    for name, catalog in (("there", there), ("here", Catalog.load(tmp_path / "shop"))):
        embed_catalog(catalog, Bytes(), tmp_path / name, dims=1, digest="b", batch_size=4, codes=False)
    pools = [ItemPool.open(tmp_path / name) for name in ("there", "here")]
    assert torch.equal(pools[0].embeddings(), pools[1].embeddings()) and pools[0].ids() == pools[1].ids()


def test_pictures_below_a_catalogue_and_what_is_missing(endpoint: str, bucket: str) -> None:
    rows = [{"id": f"i{i}", "title": f"t{i}", "file_name": f"images/{i}.png"} for i in range(3)]
    put(endpoint, f"{bucket}/shop/metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for i in range(2):
        put(endpoint, f"{bucket}/shop/images/{i}.png", picture(i))
    catalog = Catalog.load(f"s3://{bucket}/shop")
    check(catalog.part(catalog.items[:2]), [0, 1])
    with pytest.raises(ImageError, match="missing"):
        load_image(catalog.picture(catalog.items[2]), "i2")
    with pytest.raises(CatalogError, match=r"s3://[^ ]*/none(.|\n)*no such"):
        Catalog.load(f"s3://{bucket}/none")
