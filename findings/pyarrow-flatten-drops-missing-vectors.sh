#!/usr/bin/env bash
# pyarrow 26.0.1: a column of vectors (fixed_size_list<float>[2]) in which one row is missing, as a matrix.
# Expected: flatten() keeps d numbers per row (they are there in memory), so reshape(-1, d) has one row per row;
#           and .values of a slice are the slice's values.
# Seen: flatten() leaves the missing row out, so every later vector moves up by one; .values keeps it, but ignores the slice.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps pyarrow==26.0.1 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import pyarrow as pa
column = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))
matrix = column.flatten().to_numpy().reshape(-1, 2)
print(len(column), "rows; flattened", matrix.tolist(), "values", column.values.to_pylist())
assert matrix.tolist() == [[1, 2], [3, 4]] and len(column.values) == 6
tail = column[2:]
print("slice", tail.to_pylist(), "flatten", tail.flatten().to_pylist(), "values", tail.values.to_pylist())
assert tail.flatten().to_pylist() == [3, 4] and tail.values.to_pylist() == [1, 2, None, None, 3, 4]
PY
