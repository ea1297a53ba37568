#!/usr/bin/env bash
# pyarrow 26.0.1 with pandas 2.3.3 beside it: what the first pa.array of a list of strings loads.
# Expected: nothing; no pandas object is in sight.
# Seen: the whole of pandas is imported (hundreds of modules, tenths of a second), which a cold look-up of one id pays.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1 pandas==2.3.3 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import sys
import pyarrow as pa
before = sum(name.split(".")[0] == "pandas" for name in sys.modules)
pa.array(["a"])
after = sum(name.split(".")[0] == "pandas" for name in sys.modules)
print(f"pandas modules before {before}, after {after}")
assert before == 0 and after > 100
PY
