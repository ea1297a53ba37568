#!/usr/bin/env bash
# lancedb 0.40.0: `_distance` of a search with distance_type("dot").
# Expected: the inner product, or its negative (as in pgvector's <#>).
# Seen: one minus the inner product, so the nearest row of [2, 0] to [3, 0] has _distance -5, and an orthogonal one has 1.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lancedb==0.40.0 pyarrow==26.0.1 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import lancedb, pyarrow as pa
rows = pa.table({"id": ["a", "b"], "vector": pa.array([[2.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32(), 2))})
table = lancedb.connect(sys.argv[1] + "/db").create_table("t", data=rows)
found = table.search([3.0, 0.0]).distance_type("dot").limit(2).to_arrow()
print(found["id"].to_pylist(), found["_distance"].to_pylist())
assert found["id"].to_pylist() == ["a", "b"] and found["_distance"].to_pylist() == [-5.0, 1.0]
PY
