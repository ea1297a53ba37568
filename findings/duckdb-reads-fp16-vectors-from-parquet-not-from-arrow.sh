#!/usr/bin/env bash
# duckdb 2.0.1 with pyarrow 26.0.1: a table of half-precision embeddings (a pool's usual dtype), once as a Parquet file and once as the
#       Arrow table that the file was written from.
# Expected: both are read alike, or at least the other columns of the table in memory are.
# Seen: the file is read, its halves as FLOAT. Of the table in memory nothing is, not even the column of ids or the number of rows:
#       "Unsupported Internal Arrow Type e".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps duckdb==2.0.1 pyarrow==26.0.1 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq

halves = pa.FixedSizeListArray.from_arrays(pa.array(np.array([1, 2, 3, 4], np.float16)), 2)
pool = pa.table({"id": [1, 2], "v": halves})
pq.write_table(pool, "pool.parquet")
read = duckdb.sql("select typeof(v), v from 'pool.parquet'").fetchall()
print("Parquet:", read)
assert read == [("FLOAT[]", [1.0, 2.0]), ("FLOAT[]", [3.0, 4.0])]
for columns in ("v", "id", "count(*)"):
    try:
        found = duckdb.sql(f"select {columns} from pool").fetchall()
    except duckdb.NotImplementedException as error:
        print(f"Arrow, {columns}: {error}")
        assert "Unsupported Internal Arrow Type e" in str(error)
    else:
        raise SystemExit(f"Arrow, {columns}: {found}: the behaviour has changed")
PY
