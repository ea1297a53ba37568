#!/usr/bin/env bash
# pynndescent 0.5.13: 300 vectors of lengths .2 to 3 times normal, asked for the 20 of largest inner product by metric "dot".
# Expected: nearly all of them, as an approximate index of so few finds, at distances 1 - inner product.
# Seen: about half. The index with metric "dot" makes all vectors unit vectors first, so it finds the 20 of largest cosine, at 1 - cosine. The
#       distance function of that name does not: of a vector twice as long it gives -1, and 1 for whatever has no positive inner product.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pynndescent==0.5.13 numba==0.68.1 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from pynndescent import NNDescent
from pynndescent.distances import named_distances

random = np.random.default_rng(0)
rows = random.standard_normal((300, 8)).astype(np.float32)
rows *= random.uniform(0.2, 3, (300, 1)).astype(np.float32)
unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
index = NNDescent(rows, metric="dot", n_neighbors=30, random_state=0)
found, distance = index.query(rows[:20], k=20, epsilon=1.0)


def recall(scores):
    best = np.argsort(-scores, axis=1)[:, :20]
    return float(np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found, best)]))


product, cosine = recall(rows[:20] @ rows.T), recall(unit[:20] @ unit.T)
gap = float(np.abs(distance[0] - (1 - unit[found[0]] @ unit[0])).max())
print(f"recall of inner products {product:.3f}, of cosines {cosine:.3f}, distance - (1 - cosine) at most {gap:.1e}")
query, dot = np.array([1.0, 0.0], np.float32), named_distances["dot"]
alone = [float(dot(query, np.array(v, np.float32))) for v in ([2, 0], [0.5, 0], [0, 1], [-0.5, 0], [-3, 0])]
print("distances by the function:", alone)
assert product < 0.7 and cosine > 0.95 and gap < 1e-5 and alone == [-1.0, 0.5, 1.0, 1.0, 1.0]
PY
