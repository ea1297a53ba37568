#!/usr/bin/env bash
# torch 2.13.0 (torch.onnx.export, dynamo) with onnxruntime 1.32.0: scaled_dot_product_attention where one query may see no key
# (an item without metadata).
# Expected: the exported model gives what torch gives, a row of zeros.
# Seen: torch gives zeros, the exported model the plain mean of all values, masked ones included; every other row agrees.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 onnx==1.22.0 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
import io
import numpy as np, onnxruntime, torch
from torch.nn.functional import scaled_dot_product_attention

class Attention(torch.nn.Module):
    def forward(self, query, key, value, mask):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, n, 8) for n in (3, 5, 5))
mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
mask[..., 1, :] = False
torch.onnx.export(Attention(), (query, key, value, mask), (file := io.BytesIO()), dynamo=True)
session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
names = [one.name for one in session.get_inputs()]
(exported,) = session.run(None, dict(zip(names, (query.numpy(), key.numpy(), value.numpy(), mask.numpy()))))
eager = Attention()(query, key, value, mask).numpy()
print("torch", eager[0, 0, 1].round(3).tolist())
print("onnx ", exported[0, 0, 1].round(3).tolist())
assert not eager[0, 0, 1].any()
assert np.allclose(exported[0, 0, 1], value.mean(dim=2)[0, 0].numpy(), atol=1e-5)
assert np.allclose(exported[0, 0, [0, 2]], eager[0, 0, [0, 2]], atol=1e-5)
PY
