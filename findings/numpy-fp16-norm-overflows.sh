#!/usr/bin/env bash
# numpy 2.4.6: np.linalg.norm of a float16 embedding, 768 numbers of 10 each, norm 277.
# Expected: 277; sums of float16 are accumulated in float32 (np.mean does that, and its answer is right).
# Seen: inf, with or without axis: squares are summed in float16, whose largest number is 65504. Normalised so, the row is zero.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import numpy as np
x = np.full((2, 768), 10, dtype=np.float16)
with np.errstate(over="ignore"):
    whole, rows = np.linalg.norm(x[0]), np.linalg.norm(x, axis=1)
print("norm", whole, "by row", rows, "mean of squares", np.mean(np.square(x[0])), "normalised", (x[0] / whole)[:2])
assert np.isinf(whole) and np.isinf(rows).all() and np.mean(np.square(x[0])) == 100 and not (x[0] / whole).any()
PY
