#!/usr/bin/env bash
# ml_dtypes 0.5.4, numpy 2.4.6: sum, mean and inner product of 5,000 ones in bfloat16, as of an embedding column kept in that type.
# Expected: as NumPy does it for float16, whose mean is taken in float32 and whose sum is pairwise: mean 1, sum within a rounding of 5,000.
# Seen: the sum of bfloat16 stops at 256, where one more is lost in rounding, and the mean is 0.0513; float8_e4m3fn stops at 16. `dot`
#       and `@` are exact there and answer in float32, which float16 does not.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ml_dtypes==0.5.4 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np

found = {}
for kind in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    ones = np.ones(5000, kind)
    found[np.dtype(kind).name] = float(ones.sum()), round(float(ones.mean()), 4), float(ones @ ones), (ones @ ones).dtype.name
print("sum, mean, dot, its dtype:", found)
assert found["float16"] == (5000.0, 1.0, 5000.0, "float16")
assert found["bfloat16"] == (256.0, 0.0513, 5000.0, "float32")
assert found["float8_e4m3fn"] == (16.0, 0.0039, 5000.0, "float32")
PY
