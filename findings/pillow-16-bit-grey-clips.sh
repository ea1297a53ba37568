#!/usr/bin/env bash
# Pillow 13.0.0: a 16-bit grey PNG (0, 1000, 30000, 65535) opened and converted to RGB, as every loader does.
# Expected: scaled to 8 bits: 0, 3, 117, 255.
# Seen: clipped: 0, 255, 255, 255; a picture with 16 bits per pixel becomes white.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps pillow==13.0.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import io
import numpy as np
from PIL import Image
buffer = io.BytesIO()
Image.fromarray(np.array([[0, 1000, 30000, 65535]], dtype=np.uint16)).save(buffer, "PNG")
picture = Image.open(buffer)
values = np.asarray(picture.convert("RGB"))[0, :, 0].tolist()
print(picture.mode, values)
assert picture.mode == "I;16" and values == [0, 255, 255, 255]
PY
