#!/usr/bin/env bash
# duckdb 2.0.1: the nearest row by array_cosine_similarity, where one row is the zero vector (an item without a picture).
# Expected: the zero vector has no similarity (NULL or 0) and ranks after the rows that point the same way.
# Seen: its similarity is NaN, NaN is the greatest number there, and ORDER BY ... DESC LIMIT 1 returns it; a missing vector
#       (NULL) ranks last.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps duckdb==2.0.1 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import duckdb
found = duckdb.sql("""
    select id, array_cosine_similarity(v, [1, 0]::float[2]) as s
    from (values ('same', [2, 0]::float[2]), ('zero', [0, 0]::float[2]), ('none', null)) t(id, v)
    order by s desc
""").fetchall()
print(found)
assert [row[0] for row in found] == ["zero", "same", "none"] and found[0][1] != found[0][1] and found[1][1] == 1
PY
