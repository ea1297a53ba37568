#!/usr/bin/env bash
# ray 2.60.0: Dataset.write_parquet to the same folder twice, as a job does that is started again.
# Expected: the second call replaces the folder or refuses; the folder then holds the rows once.
# Seen: it adds files with fresh names beside the old ones, and the folder reads back as every row twice.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[data]==2.60.0" pyarrow==26.0.1 pandas==2.3.3 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import pyarrow.parquet as pq
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
out = sys.argv[1] + "/out"
counts = []
for _ in range(2):
    ray.data.range(10).write_parquet(out)
    counts.append(pq.read_table(out).num_rows)
print("rows after each write:", counts)
assert counts == [10, 20]
PY
