#!/usr/bin/env bash
# numpy 2.4.6 (scipy-openblas 0.3.31), faiss-cpu 1.15.1, on two threads: processor time that a process takes in the 100 ms after a product or a
# search, in which it does nothing.
# Expected: a few milliseconds, as GNU's OpenMP workers spin, which faiss and torch use.
# Seen: faiss 2 to 7 ms. NumPy's worker holds a core for 2^28 ticks of the time stamp counter, 131 ms at 2 GHz, after each product: what is
#       timed next to it has a core less, and rows of a benchmark that come after NumPy's are slow by turns. OPENBLAS_THREAD_TIMEOUT=20 in the
#       environment (ticks as a power of two, read when NumPy is loaded) ends it within a millisecond.
set -euo pipefail
[ "$(nproc)" -ge 2 ] || { echo "needs two processors"; exit 1; }
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 faiss-cpu==1.15.1 2>/dev/null
cat > "$folder/after.py" <<'PY'
import statistics
import sys
import time

import numpy as np

rows = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
if sys.argv[1] == "numpy":
    def work():
        return rows @ rows
else:
    import faiss

    faiss.omp_set_num_threads(2)
    index = faiss.IndexFlatIP(512)
    index.add(np.tile(rows, (100, 1)))

    def work():
        return index.search(rows[:1], 10)
taken = []
for _ in range(7):
    work()
    begin = time.process_time()
    time.sleep(0.1)
    taken.append((time.process_time() - begin) * 1e3)
print(round(statistics.median(taken), 1))
PY
export OPENBLAS_NUM_THREADS=2 OMP_NUM_THREADS=2
numpy=$("$folder/venv/bin/python" "$folder/after.py" numpy)
faiss=$("$folder/venv/bin/python" "$folder/after.py" faiss)
short=$(OPENBLAS_THREAD_TIMEOUT=20 "$folder/venv/bin/python" "$folder/after.py" numpy)
echo "processor milliseconds in the 100 after: numpy $numpy, faiss $faiss, numpy with OPENBLAS_THREAD_TIMEOUT=20 $short"
python3 -c "import sys; n, f, s = map(float, sys.argv[1:]); sys.exit(not (n > 30 and f < 15 and s < 5))" "$numpy" "$faiss" "$short"
