#!/usr/bin/env bash
# sqlite-vec 0.1.9 (a vec0 table with distance_metric=cosine, through apsw 3.54.1.0): the two nearest rows of a query, where one row is the zero
#       vector (an item without a picture) and two others have an angle to the query.
# Expected: the zero vector has no cosine distance and comes last, or is left out.
# Seen: its distance is NULL, and it takes a place among the k nearest: of k = 2 one is the zero vector, and the second nearest row is
#       not returned, whatever the rows are ordered by afterwards.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps sqlite-vec==0.1.9 apsw==3.54.1.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import struct
import apsw, sqlite_vec

def vector(*values):
    return struct.pack(f"{len(values)}f", *values)

base = apsw.Connection(":memory:")
base.enable_load_extension(True)
base.load_extension(sqlite_vec.loadable_path())
base.execute("create virtual table pool using vec0(id integer primary key, v float[2] distance_metric=cosine)")
for name, row in enumerate((vector(2, 0), vector(0, 0), vector(1, 1), vector(-1, 0))):
    base.execute("insert into pool(id, v) values (?, ?)", (name, row))
nearest = "select id, distance from pool where v match ? and k = ? order by distance is null, distance"
two = list(base.execute(nearest, (vector(1, 0), 2)))
print(two, list(base.execute(nearest, (vector(1, 0), 4))))
assert two == [(0, 0.0), (1, None)]
PY
