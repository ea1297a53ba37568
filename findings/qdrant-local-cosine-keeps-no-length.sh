#!/usr/bin/env bash
# qdrant-client 1.20.0, local mode: what a collection gives back of the vectors that were put into it.
# Expected: the stored vector, whatever the distance; normalising would be the search's affair.
# Seen: with Distance.COSINE the vector comes back normalised, its length is lost; with Distance.DOT it comes back as it was.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q qdrant-client==1.20.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
from qdrant_client import QdrantClient, models
client = QdrantClient(":memory:")
seen = {}
for kind in (models.Distance.COSINE, models.Distance.DOT):
    client.create_collection(kind.value, vectors_config=models.VectorParams(size=2, distance=kind))
    client.upsert(kind.value, [models.PointStruct(id=1, vector=[3.0, 4.0])])
    seen[kind.value] = [round(x, 4) for x in client.retrieve(kind.value, [1], with_vectors=True)[0].vector]
print(seen)
assert seen == {"Cosine": [0.6, 0.8], "Dot": [3.0, 4.0]}
PY
