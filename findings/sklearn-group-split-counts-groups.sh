#!/usr/bin/env bash
# scikit-learn 1.9.1: GroupShuffleSplit(test_size=0.5) over 90 samples of one group and 10 groups of one sample.
# Expected: about half of the samples, as near as whole groups allow: the big group against all others.
# Seen: test_size is a share of the groups, samples are not counted: over many draws the test set holds 6 or 95 of 100 samples.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from sklearn.model_selection import GroupShuffleSplit
groups = np.array([0] * 90 + list(range(1, 11)))
splits = GroupShuffleSplit(n_splits=50, test_size=0.5, random_state=0).split(groups, groups=groups)
sizes = {(len(test), len(set(groups[test]))) for _, test in splits}
print("samples and groups in the test set:", sorted(sizes))
assert sizes == {(6, 6), (95, 6)}
PY
