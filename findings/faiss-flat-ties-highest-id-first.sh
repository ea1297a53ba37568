#!/usr/bin/env bash
# faiss-cpu 1.15.1: IndexFlatIP over rows that all score the same, the first five of them.
# Expected: ids 0 1 2 3 4, as a stable sort would give, or any five.
# Seen: the five lowest ids are the ones that are kept, but they are listed from the highest to the lowest: 4 3 2 1 0. For
#       k = 1 it is 0, so the first of five is not the first of one.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps faiss-cpu==1.15.1 numpy==2.4.6 packaging==25.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import faiss, numpy as np
rows = np.ones((1000, 16), dtype=np.float32)
index = faiss.IndexFlatIP(16)
index.add(rows)
found = {k: index.search(rows[:1], k)[1][0] for k in (1, 5, 100, 500)}
print({k: ids[:5].tolist() for k, ids in found.items()})
assert all((ids == np.arange(k)[::-1]).all() for k, ids in found.items())
many = index.search(rows[:32], 5)[1]
assert (many == [4, 3, 2, 1, 0]).all()
PY
