#!/usr/bin/env bash
# usearch 2.26.6: more neighbours asked for than the index holds.
# Expected: missing places marked by a key that no item can have (as faiss does with -1), or an error.
# Seen: they carry key 0, which is the key of a real item, with distance NaN; only `counts` tells. The module's function
#       search() over a matrix raises for the same question.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q usearch==2.26.6 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from usearch.index import Index, MetricKind, search

rows = np.eye(3, 8, dtype=np.float32)
index = Index(ndim=8, metric="ip", dtype="f32")
index.add(np.arange(3), rows)
found = index.search(rows[1:], 5)
print(found.keys.tolist(), found.distances.tolist(), found.counts.tolist())
assert (found.keys[:, 3:] == 0).all() and np.isnan(found.distances[:, 3:]).all() and found.counts.tolist() == [3, 3]
try:
    search(rows, rows[1], 5, MetricKind.IP, exact=True)
except ValueError as error:
    print("search():", error)
else:
    raise SystemExit("search() took it")
PY
