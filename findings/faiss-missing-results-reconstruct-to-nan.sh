#!/usr/bin/env bash
# faiss-cpu 1.15.1: search_and_reconstruct for more neighbours than the index has.
# Expected: ids of -1, and zeros for vectors that do not exist.
# Seen: ids of -1, and vectors of NaN: a mean of the neighbours' vectors, or re-scoring them, gives NaN.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps faiss-cpu==1.15.1 numpy==2.4.6 packaging==25.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import faiss, numpy as np
index = faiss.IndexFlatIP(2)
index.add(np.array([[1, 0], [0, 1]], dtype=np.float32))
scores, ids, vectors = index.search_and_reconstruct(np.array([[2, 1]], dtype=np.float32), 4)
print(scores, ids, vectors.tolist())
assert ids.tolist() == [[0, 1, -1, -1]] and np.isnan(vectors[0, 2:]).all() and scores[0, 2] == -np.finfo(np.float32).max
PY
