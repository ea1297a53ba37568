#!/usr/bin/env bash
# usearch 2.26.6: an inner-product index whose vectors are stored as i8.
# Expected: values scaled by 127 and clipped, or an error for values beyond ±1; a row ten times as long as another in the same
#       direction has ten times its score, or both clip.
# Seen: every vector is scaled to length 127 of its own, in indexes by inner product and by Euclidean distance too: a row and
#       ten times that row are the same row. f16 and bf16 of the same index keep the lengths.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q usearch==2.26.6 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from usearch.index import Index

row = np.random.default_rng(0).standard_normal(64).astype(np.float32)
row /= np.linalg.norm(row)
for metric in ("ip", "l2sq"):
    for dtype in ("f32", "bf16", "f16", "i8"):
        index = Index(ndim=64, metric=metric, dtype=dtype)
        index.add(np.arange(2), np.stack([row, 10 * row]))
        found = index.search(row, 2, exact=True)
        lengths = [float(np.linalg.norm(np.asarray(index.get(key), np.float32))) for key in (0, 1)]
        print(metric, dtype, "lengths", [round(v, 2) for v in lengths], "distances", found.distances.tolist())
        same = found.distances[0] == found.distances[1]
        assert same == (dtype == "i8"), (metric, dtype)
        assert (abs(lengths[1] / lengths[0] - (1 if dtype == "i8" else 10)) < 0.05), lengths
PY
