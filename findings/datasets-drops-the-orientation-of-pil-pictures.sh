#!/usr/bin/env bash
# datasets 4.0.0, pillow 13.0.0: one JPEG with EXIF orientation 6, put into an Image column as bytes and as the PIL picture opened from
# those bytes.
# Expected: the same picture from both rows; decoding turns pictures by their EXIF orientation, and a PIL picture still knows its own.
# Seen: the row of bytes is upright (16 x 32), the row of the PIL picture lies on its side (32 x 16): encoding saves pixels without
#       EXIF, so the orientation is gone before decoding could use it. PNG and WebP do the same; TIFF keeps its tag.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==4.0.0 pillow==13.0.0 numpy==2.4.6 2>/dev/null
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import io

import datasets
import numpy as np
from PIL import Image

found = {}
for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x112] = 6
    Image.fromarray(np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3)).save(file, kind, exif=exif)
    rows = [{"bytes": file.getvalue(), "path": None}, Image.open(file)]
    features = datasets.Features({"image": datasets.Image()})
    made = [datasets.Dataset.from_dict({"image": [row]}, features=features)[0]["image"].size for row in rows]
    found[kind] = made
print("size from bytes, from the PIL picture:", found)
assert all(found[kind] == [(16, 32), (32, 16)] for kind in ("JPEG", "PNG", "WEBP")) and found["TIFF"] == [(16, 32)] * 2
PY
