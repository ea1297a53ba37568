#!/usr/bin/env bash
# torch 2.13.0, CPU, torch.compile with torch._inductor.config.freezing (what the CPU inference guides switch on): a convolution and the
#       activation behind it, of a picture with one NaN.
# Expected: NaN where eager mode has NaN, so that a check of the output for NaN still finds a broken input.
# Seen: with ReLU, ReLU6 and Hardtanh the frozen graph is one oneDNN call whose clamp makes a number of NaN: 72 NaN in eager mode, none
#       in the frozen one. SiLU, GELU, Hardswish and Sigmoid keep all 72.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 setuptools==80.9.0 2>/dev/null
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" - <<'PY'
import torch
import torch._inductor.config
from torch import nn

torch._inductor.config.freezing = True
x = torch.randn(1, 3, 8, 8)
x[0, 0, 4, 4] = float("nan")
expected = {nn.ReLU: 0, nn.ReLU6: 0, nn.Hardtanh: 0, nn.SiLU: 72, nn.GELU: 72, nn.Hardswish: 72, nn.Sigmoid: 72}
for kind, left in expected.items():
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), kind()).eval()
    with torch.no_grad():
        eager, frozen = (int(run(x).isnan().sum()) for run in (layers, torch.compile(layers)))
    print(f"{kind.__name__}: {eager} NaN in eager mode, {frozen} frozen")
    assert (eager, frozen) == (72, left)
PY
