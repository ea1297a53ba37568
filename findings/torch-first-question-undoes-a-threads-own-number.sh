#!/usr/bin/env bash
# torch 2.13.0: torch.set_num_threads in a thread of a pool (one part of a batch per thread, each on one core).
# Expected: the number is either the process's, so that the last call wins everywhere, or the thread's own, so that it stays what
#       the thread set.
# Seen: neither. A thread's first torch.get_num_threads() (or first parallel operation) takes over the number that was set last in any
#       thread, even if this thread has set its own before; from then on its own number stays. So a worker that sets 1 and has asked
#       nothing yet computes on two threads once the main thread sets 2; one that asked first stays at 1. Threads that start later
#       begin with the last number set anywhere. The main thread is no exception.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > "$folder/thread_numbers.py" <<'PY'
import sys
import threading

import torch

ask_first = sys.argv[1] == "asked"
torch.set_num_threads(2)
if ask_first:
    torch.get_num_threads()
is_set, go, seen = threading.Event(), threading.Event(), []


def worker():
    if ask_first:
        torch.get_num_threads()
    torch.set_num_threads(1)
    is_set.set()
    go.wait()
    seen.append(torch.get_num_threads())


thread = threading.Thread(target=worker)
thread.start()
is_set.wait()
main = torch.get_num_threads()
later = []
other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
other.start()
other.join()
torch.set_num_threads(2)
go.set()
thread.join()
print(sys.argv[1], "first: main, which set 2, has", main, "; a later thread", later[0], "; the worker, which set 1, has", seen[0])
assert (main, later[0], seen[0]) == ((2, 1, 1) if ask_first else (1, 1, 2))
PY
"$folder/venv/bin/python" "$folder/thread_numbers.py" asked
"$folder/venv/bin/python" "$folder/thread_numbers.py" "nothing asked"
