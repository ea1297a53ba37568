#!/usr/bin/env bash
# voyager 2.2.3: Index.get_distance(a, b) of an inner-product index.
# Expected: a function of a and b, 1 - a·b, the distance that query() reports for the same two vectors.
# Seen: it depends on what else the index holds. Each argument gets the extra coordinate that makes all rows equally long, so two
#       orthogonal vectors are 1 apart in an empty index and -143 apart once a longer row has been added; query() still says 1.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q voyager==2.2.3 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from voyager import Index, Space

a, b, long = (np.array(v, np.float32) for v in ([3, 0], [0, 4], [12, 5]))
index = Index(Space.InnerProduct, 2)
before = index.get_distance(a, b)
index.add_items(np.stack([a, b, long]))
after = index.get_distance(a, b)
labels, distances = index.query(a, 3)
asked = float(distances[labels.tolist().index(1)])
print("get_distance before", before, "after", after, "query", asked)
assert before == asked == 1 and after == -143
PY
