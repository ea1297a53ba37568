"""Pools into the tables and engines that others search: NumPy, Parquet, LanceDB, Qdrant, PostgreSQL with pgvector.

Each takes a whole pool, block by block, through that project's own client, with the ids and the pool's order (column
`row`): reading back by `row` gives the pool again, bit for bit in fp32. What those engines answer is theirs:
approximate where their index is, and with scores of their own sign.

Source: ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tgq_fast.arguments import checked
from tgq_fast.errors import ArgumentError, DependencyError, StorageError
from tgq_fast.io.files import atomic_writer, make_folder, storage_errors, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from tgq_fast.pool.item_pool import ItemPool

__all__ = ["to_lance", "to_numpy", "to_parquet", "to_pgvector", "to_qdrant"]

STEP = 16_384  # rows at a time
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


def _blocks(pool: ItemPool, step: int = STEP) -> Iterator[tuple[int, list[str], NDArray[np.float32]]]:
    """(first row, ids, [n, D] fp32 rows) over the whole pool in order."""
    for start, rows in pool.batches(step):
        names = pool.names(np.arange(start, start + len(rows)))
        yield start, [str(name) for name in names], rows.float().numpy()


def _arrow(pool: ItemPool) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Columns id, row and vector (fixed-size list of fp32), and the pool in batches of them."""
    import pyarrow as pa

    schema = pa.schema(
        [("id", pa.string()), ("row", pa.int64()), ("vector", pa.list_(pa.float32(), pool.dims))]  # nothing is null
    )

    def batches() -> Iterator[pa.RecordBatch]:
        for start, ids, rows in _blocks(pool):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), pool.dims)
            numbers = pa.array(np.arange(start, start + len(ids)))
            yield pa.record_batch([pa.array(ids, pa.string()), numbers, vectors], schema=schema)

    return schema, batches()


@checked
def to_numpy(pool: ItemPool, folder: str | Path) -> tuple[Path, Path]:
    """`embeddings.npy` [n, D] fp32 and `ids.txt`, one id per line, in a folder; returns both paths.

    Raises:
        ArgumentError: an id holds a line break.
    """
    root = make_folder(folder)
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(pool), pool.dims)}
    names: list[str] = []
    with atomic_writer(root / "embeddings.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, ids, rows in _blocks(pool):
            if any("\n" in name or "\r" in name for name in ids):
                raise ArgumentError("pool", "an id with a line break", "ids of one line; to_parquet takes any id")
            file.write(np.ascontiguousarray(rows, dtype="<f4").data)
            names += ids
    write_atomic(root / "ids.txt", "".join(f"{name}\n" for name in names).encode())
    return root / "embeddings.npy", root / "ids.txt"


@checked
def to_parquet(pool: ItemPool, path: str | Path) -> Path:
    """One Parquet file with the columns id, row and vector (fixed-size list of fp32)."""
    import pyarrow.parquet as pq

    schema, batches = _arrow(pool)
    with atomic_writer(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
    return Path(path)


@checked
def to_lance(pool: ItemPool, uri: str | Path, table: str = "items", *, overwrite: bool = False) -> Any:
    """A LanceDB table with the columns id, row and vector; returns it opened.

    Search it with `.distance_type("dot")`: its `_distance` is then one minus the inner product.

    Raises:
        DependencyError: lancedb is not installed.
        ArgumentError: the table exists and `overwrite` is not set.
    """
    try:
        import lancedb
    except ImportError:
        raise DependencyError("lancedb is not installed; pip install 'tgq-fast[lance]'") from None
    schema, batches = _arrow(pool)
    try:
        with storage_errors(uri):
            database = lancedb.connect(str(uri))
            return database.create_table(
                table, data=batches, schema=schema, mode="overwrite" if overwrite else "create"
            )
    except RuntimeError as error:  # of its Rust part, with the system's number in the text
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        code = int(number[1])
        raise StorageError(uri, OSError(code, os.strerror(code))) from error
    except ValueError as error:
        if "exists" not in str(error):
            raise
        raise ArgumentError("table", repr(table), "the name of a new table, or overwrite=True") from None


@checked
def to_qdrant(pool: ItemPool, client: Any, collection: str, *, overwrite: bool = False) -> int:
    """A Qdrant collection of inner-product vectors: point number = pool row, payload {"id": …}; returns the points.

    The distance is Dot, so the vectors are kept as they are (Cosine would normalise them).

    Args:
        client: a `qdrant_client.QdrantClient`, of a server, a folder or memory.

    Raises:
        DependencyError: qdrant-client is not installed.
        ArgumentError: the collection exists and `overwrite` is not set.
    """
    try:
        from qdrant_client import models
    except ImportError:
        raise DependencyError("qdrant-client is not installed; pip install 'tgq-fast[qdrant]'") from None
    if client.collection_exists(collection):
        if not overwrite:
            raise ArgumentError("collection", repr(collection), "the name of a new collection, or overwrite=True")
        client.delete_collection(collection)
    client.create_collection(
        collection, vectors_config=models.VectorParams(size=pool.dims, distance=models.Distance.DOT)
    )
    for start, ids, rows in _blocks(pool, 2048):
        client.upload_collection(
            collection,
            vectors=rows,
            ids=list(range(start, start + len(ids))),
            payload=[{"id": name} for name in ids],
            wait=True,
        )
    return int(client.count(collection).count)


@checked
def to_pgvector(pool: ItemPool, connection: Any, table: str, *, overwrite: bool = False) -> int:
    """A PostgreSQL table (id text primary key, row bigint, embedding vector(D)), filled by COPY in one transaction.

    `ORDER BY embedding <#> query` searches it: that operator is the negative inner product. pgvector indexes at most
    2,000 dimensions.

    Args:
        connection: an open `psycopg.Connection` to a database where the extension `vector` can be created.

    Returns:
        rows written.

    Raises:
        DependencyError: psycopg or pgvector is not installed.
        ArgumentError: no plain table name, or the table exists and `overwrite` is not set.
    """
    try:
        from pgvector.psycopg import register_vector
        from psycopg import sql
    except ImportError:
        raise DependencyError("psycopg and pgvector are not installed; pip install 'tgq-fast[pgvector]'") from None
    if not _NAME.fullmatch(table):
        raise ArgumentError("table", repr(table), "a name of letters, digits and underscores")
    name = sql.Identifier(table)
    with connection.transaction():
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        register_vector(connection)
        if connection.execute("SELECT to_regclass(%s)", (f'"{table}"',)).fetchone()[0] is not None:
            if not overwrite:
                raise ArgumentError("table", repr(table), "the name of a new table, or overwrite=True")
            connection.execute(sql.SQL("DROP TABLE {}").format(name))
        columns = sql.SQL("CREATE TABLE {} (id text PRIMARY KEY, row bigint NOT NULL, embedding vector({}) NOT NULL)")
        connection.execute(columns.format(name, sql.Literal(pool.dims)))
        copy = sql.SQL("COPY {} (id, row, embedding) FROM STDIN WITH (FORMAT BINARY)").format(name)
        with connection.cursor().copy(copy) as stream:
            stream.set_types(["text", "int8", "vector"])
            for start, ids, rows in _blocks(pool):
                for number, (item, row) in enumerate(zip(ids, rows, strict=True), start):
                    stream.write_row((item, number, row))
    return len(pool)
