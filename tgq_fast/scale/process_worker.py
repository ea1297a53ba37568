"""A worker process: reads a job and tasks from its standard input, answers on its standard output."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time

_LOOK = 0.5  # seconds between looks whether the parent is still there


def main() -> None:
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends its workers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="worker: %(message)s")
    requests = sys.stdin.buffer
    try:
        job = pickle.load(requests)
        from tgq_fast.scale.crew import Worker

        worker = Worker(job)
        _answer(answers, True)
        while True:
            _answer(answers, worker.do(pickle.load(requests)))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the driver is done


def _answer(file: object, value: object) -> None:
    pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)  # type: ignore[arg-type]
    file.flush()  # type: ignore[attr-defined]


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)  # the driver was killed; what this process was at is done again


if __name__ == "__main__":
    main()
