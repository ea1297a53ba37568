#!/usr/bin/env bash
# ml_dtypes 0.5.4, numpy 2.4.6: six scores in bfloat16, one of them NaN, sorted and partitioned for their two best.
# Expected: NaN last, all others in order, as NumPy sorts every floating type of its own.
# Seen: 1.5, NaN, -2, 0.5, 2, 3, whatever the kind of sort: what stands before the NaN stays there. The two best by argpartition are 3 and 2
#       in float16, but NaN and 1.5 in bfloat16 and float8. NaN is compared by < alone there, so it is neither before nor after anything.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ml_dtypes==0.5.4 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np

scores = [1.5, float("nan"), -2.0, 3.0, 0.5, 2.0]
found = {}
for kind in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    given = np.array(scores, kind)
    best = given[np.argpartition(-given, 2)[:2]]
    found[np.dtype(kind).name] = [float(v) for v in np.sort(given)], {str(v) for v in best.astype(float)}
print("sorted, two best:", found)
assert found["float16"][0][:5] == sorted(s for s in scores if s == s) and found["float16"][1] == {"2.0", "3.0"}
for kind in ("bfloat16", "float8_e4m3fn"):
    assert str(found[kind][0]) == "[1.5, nan, -2.0, 0.5, 2.0, 3.0]" and found[kind][1] == {"1.5", "nan"}
PY
