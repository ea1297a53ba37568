#!/usr/bin/env bash
# pytrec-eval-terrier 0.5.11 and ranx 0.3.21: the reciprocal rank of d1 in a run where d1, d2, d3 score the same.
# Expected: both break ties in one way, or both take the order of the run: 1.
# Seen: trec_eval ignores the order that is given and puts ties in descending order of the document's name, so 1/3; ranx keeps
#       the order in which the run was written, so 1, or 1/3 for the same scores written the other way round.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pytrec-eval-terrier==0.5.11 ranx==0.3.21 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import pytrec_eval, ranx
qrels = {"q": {"d1": 1}}
runs = [{"q": dict.fromkeys(names, 0.5)} for names in (("d1", "d2", "d3"), ("d3", "d2", "d1"))]
trec = [pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)["q"]["recip_rank"] for run in runs]
theirs = [float(ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), "mrr")) for run in runs]
print("trec_eval", trec, "ranx", theirs)
assert all(abs(value - 1 / 3) < 1e-6 for value in (*trec, theirs[1])) and theirs[0] == 1
PY
