#!/usr/bin/env bash
# gguf 0.19.0: the shape that GGUFReader gives for a tensor that was written as an array of 3 rows and 32 columns.
# Expected: (3, 32), as written and as the reader's own .data has it.
# Seen: tensor.shape is [32, 3] (ggml counts the fastest dimension first) while tensor.data.shape is (3, 32): reshaping the
#       flat data to tensor.shape scrambles it without an error.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import gguf, numpy as np
path, written = sys.argv[1] + "/x.gguf", np.arange(96, dtype=np.float32).reshape(3, 32)
writer = gguf.GGUFWriter(path, "llama")
writer.add_tensor("a", written)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tensor = gguf.GGUFReader(path).tensors[0]
print("shape", tensor.shape.tolist(), "data", tensor.data.shape)
assert tensor.shape.tolist() == [32, 3] and tensor.data.shape == (3, 32) and (tensor.data == written).all()
PY
