"""Workers that are processes of this machine, spoken to over their own pipes.

Source: ours.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import torch

from tgq_fast.errors import ArgumentError, WorkerError
from tgq_fast.scale.crew import Job, Lost

__all__ = ["ProcessCrew"]

_STARTS = 3  # of a worker that does not get as far as its first task


class ProcessCrew:
    """`count` processes, each with its share of this process's threads; on a machine with GPUs they take turns at them.

    What goes through the pipes is pickled: both ends are this program, and nobody else has the pipes.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ArgumentError("workers", count, "at least 1")
        self.count = count
        self._run: _Run | None = None

    def start(self, job: Job) -> None:
        self._run = _Run(job)

    def give(self, worker: int, task: Any) -> None:
        assert self._run is not None
        threading.Thread(target=self._run.ask, args=(worker, task), name=f"tgq-worker-{worker}", daemon=True).start()

    def answer(self, seconds: float | None = None) -> tuple[int, Any] | None:
        assert self._run is not None
        try:
            worker, answer = self._run.answers.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(answer, WorkerError):
            raise answer
        return worker, answer

    def stop(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    close = stop


class _Run:
    """Processes of one run, and what they answered."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self._workers: dict[int, _Process] = {}
        self._closed = False

    def ask(self, worker: int, task: Any) -> None:
        """Have a worker do a task, in a thread of its own; a worker that is not there is started."""
        answer: Any
        try:
            answer = self._worker(worker).ask(task)
        except _GoneError as gone:
            with self._lock:
                self._workers.pop(worker, None)
            answer = Lost(str(gone))
        except WorkerError as error:
            answer = error
        except BaseException as error:  # whoever waits must not wait for ever
            answer = WorkerError(f"worker {worker}: {error!r}")
        self.answers.put((worker, answer))

    def _worker(self, number: int) -> _Process:
        for _ in range(_STARTS):
            with self._lock:
                if self._closed:
                    raise WorkerError("the run has ended")
                if number in self._workers:
                    return self._workers[number]
                process = self._workers[number] = _Process(number)
            try:
                process.ask(self.job)
                return process
            except _GoneError as gone:
                reason = str(gone)
                with self._lock:
                    self._workers.pop(number, None)
        raise WorkerError(f"worker {number} does not start: {reason}; its own messages are above")

    def close(self) -> None:
        """End all processes, those that start just now among them."""
        with self._lock:
            self._closed = True
            for process in self._workers.values():
                process.end()
            self._workers.clear()


class _GoneError(Exception):
    """The process is gone; says how it ended."""


class _Process:
    """One worker process."""

    def __init__(self, number: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        if gpus := torch.cuda.device_count():
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = seen.split(",") if seen else list(map(str, range(gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = names[number % gpus]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tgq_fast.scale.process_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def ask(self, message: object) -> Any:
        """Send something and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            pickle.dump(message, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)  # its own end, whose code tells why
            self.end()
            code = self.process.returncode
            raise _GoneError(f"signal {-code}" if code < 0 else f"exit code {code}") from None

    def end(self) -> None:
        """Kill it: it writes nothing that could be left half done."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()
