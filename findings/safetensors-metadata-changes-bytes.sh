#!/usr/bin/env bash
# safetensors 0.8.0: the bytes of a file with the same tensors and the same metadata, saved by several processes.
# Expected: the same bytes; tensors are put in a fixed order on purpose, so that files can be told by their digest.
# Seen: with several metadata entries the header lists them in an order of its own in every process; with one entry, or none,
#       the bytes are the same.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps safetensors==0.8.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import subprocess, sys
code = """
import hashlib, numpy, safetensors.numpy as s
for count in (1, 8):
    data = s.save({"b": numpy.zeros(2), "a": numpy.ones(2)}, {f"key{i}": "x" for i in range(count)})
    print(hashlib.sha256(data).hexdigest()[:12])
"""
runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(6)]
one, eight = (set(column) for column in zip(*(run.stdout.split() for run in runs)))
print("one entry:", len(one), "digests; eight entries:", len(eight), "digests of", len(runs))
assert len(one) == 1 and len(eight) > 1
PY
