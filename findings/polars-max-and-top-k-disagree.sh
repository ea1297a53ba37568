#!/usr/bin/env bash
# polars 2.1.0: the largest of the scores 1.0 and NaN.
# Expected: max() is the first of top_k(1); and sorted in descending order a missing score comes last.
# Seen: max() leaves NaN out and gives 1.0, top_k(1) gives NaN; and sort(descending=True) begins with the missing score.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps polars==2.1.0 polars-runtime-32==2.1.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import math
import polars as pl
frame = pl.DataFrame({"id": ["a", "b", "c"], "score": [1.0, float("nan"), None]})
best, top = frame["score"].max(), frame["score"].top_k(1)[0]
order = frame.sort("score", descending=True)["id"].to_list()
print("max", best, "top_k", top, "row of top_k", frame.top_k(1, by="score")["id"][0], "sorted", order)
assert best == 1.0 and math.isnan(top) and order == ["c", "b", "a"]
PY
