#!/usr/bin/env bash
# faiss-cpu 1.15.1: a copy by clone_index of an exact inner-product index of the Panorama kind.
# Expected: an index of the same class with the same answers, as clone_index gives for IndexFlatL2Panorama and as
#       copy.deepcopy gives here.
# Seen: a plain IndexFlat over Panorama's own storage, which holds a row in pieces per level and block: every row reads back
#       as a mixture of several rows, and no row finds itself any more. An IndexPreTransform around it is copied the same way.
#       Nothing is raised. get_xb() of the original points at that storage too; only reconstruct gives rows.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q faiss-cpu==1.15.1 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import copy
import faiss, numpy as np

rows = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)

def found(index):
    return float((index.search(rows, 1)[1].ravel() == np.arange(1000)).mean())

ip, l2 = faiss.IndexFlatIPPanorama(64, 8, 128), faiss.IndexFlatL2Panorama(64, 8, 128)
turned = faiss.IndexPreTransform(faiss.PCAMatrix(64, 64), faiss.IndexFlatIPPanorama(64, 8, 128))
for index in (ip, l2, turned):
    index.train(rows)
    index.add(rows)
for name, index in (("ip", ip), ("l2", l2), ("pre-transform", turned)):
    clone = faiss.clone_index(index)
    print(f"{name}: {found(index):.3f} of the rows find themselves, {found(clone):.3f} in the clone, a {type(clone).__name__}")
print(f"deepcopy: {found(copy.deepcopy(ip)):.3f}")
clone = faiss.clone_index(ip)
assert type(clone) is faiss.IndexFlat and found(ip) > 0.9 and found(clone) < 0.1
assert found(faiss.clone_index(turned)) < 0.1 < 0.9 < found(turned)
assert found(faiss.clone_index(l2)) == found(copy.deepcopy(l2)) == 1 and found(copy.deepcopy(ip)) == found(ip)
stored = faiss.rev_swig_ptr(ip.get_xb(), rows.size).reshape(rows.shape)
assert (ip.reconstruct(7) == rows[7]).all() and not (stored[7] == rows[7]).all()
PY
