#!/usr/bin/env bash
# hnswlib 0.8.0: distances of the brute-force index (BFIndex) with space "cosine".
# Expected: 1 - cosine, between 0 and 2, as Index(space="cosine") gives.
# Seen: stored rows are normalised, queries are not: the distance is 1 - |query| · cosine, -6.3 for a row and itself here, so
#       distances of two queries cannot be compared and a threshold means nothing. The order of one query's neighbours is right.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q hnswlib==0.8.0 numpy==2.4.6 setuptools==80.9.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import hnswlib, numpy as np

rows = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
brute, graph = hnswlib.BFIndex("cosine", 64), hnswlib.Index("cosine", 64)
for index in (brute, graph):
    index.init_index(1000)
    index.add_items(rows, np.arange(1000))
graph.set_ef(1000)
label, distance = brute.knn_query(rows[:1], 2)
true_label, true_distance = graph.knn_query(rows[:1], 2)
length = float(np.linalg.norm(rows[0]))
print("BFIndex", distance[0].tolist(), "Index", true_distance[0].tolist(), "length of the query", length)
assert (label == true_label).all() and abs(true_distance[0, 0]) < 1e-5
assert np.allclose(1 - distance[0], length * (1 - true_distance[0]), atol=1e-3) and distance[0, 0] < -5
PY
