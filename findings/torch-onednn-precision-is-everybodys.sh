#!/usr/bin/env bash
# torch 2.13.0: the precision of fp32 products, set for one backend by the newer names.
# Expected: torch.backends.mkldnn.fp32_precision sets oneDNN's; the setting above all backends stays; the older
#       torch.get_float32_matmul_precision() tells something, as nothing older was ever set.
# Seen: the setting above all backends, torch.backends.fp32_precision, changes with it (CUDA's products, asked by their own name, still
#       say "none"); and once one product's precision is set by the newer names, the older getter raises a RuntimeError about mixing the two.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import torch

b = torch.backends
before = b.fp32_precision
b.mkldnn.fp32_precision = "bf16"
print(f"above all: {before} -> {b.fp32_precision}; CUDA's products: {b.cuda.matmul.fp32_precision}")
assert (before, b.fp32_precision, b.cuda.matmul.fp32_precision) == ("none", "bf16", "none")
b.mkldnn.fp32_precision = "none"
assert torch.get_float32_matmul_precision() == "highest"
b.mkldnn.matmul.fp32_precision = "bf16"
try:
    print(torch.get_float32_matmul_precision())
    raise SystemExit("the getter answers: the behaviour has changed")
except RuntimeError as error:
    print(str(error)[:80])
    assert "mix" in str(error)
PY
