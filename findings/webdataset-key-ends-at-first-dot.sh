#!/usr/bin/env bash
# webdataset 1.0.2: samples of a shard whose files are shoe_v1.2.jpg, shoe_v1.2.json and shoe_v1.5.jpg.
# Expected: two samples, shoe_v1.2 (jpg, json) and shoe_v1.5 (jpg): the extension begins at the last dot.
# Seen: one sample, shoe_v1, with fields 2.jpg, 2.json and 5.jpg: the key ends at the first dot, and products become one.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q webdataset==1.0.2 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PY'
import io, sys, tarfile
import webdataset as wds
path = sys.argv[1] + "/shard.tar"
with tarfile.open(path, "w") as shard:
    for name in ("shoe_v1.2.jpg", "shoe_v1.2.json", "shoe_v1.5.jpg"):
        entry = tarfile.TarInfo(name)
        entry.size = 1
        shard.addfile(entry, io.BytesIO(b"x"))
samples = list(wds.WebDataset(path, shardshuffle=False))
found = [(s["__key__"], sorted(name for name in s if not name.startswith("__"))) for s in samples]
print(found)
assert found == [("shoe_v1", ["2.jpg", "2.json", "5.jpg"])]
PY
