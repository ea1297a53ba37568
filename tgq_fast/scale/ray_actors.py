"""Workers that are actors of a Ray cluster. The only module that imports Ray.

Plain actors, not Ray Data: parts are few and large, the order of commits is the driver's, and attempts are counted on
its disk; an actor pool of Ray Data would retry an item that ends its worker without end, and needs processors for reads
beside the actors'.

Source: ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tgq_fast.errors import ArgumentError, DependencyError, WorkerError
from tgq_fast.scale.crew import Job, Lost, Worker

try:
    ray: Any = import_module("ray")  # Any: its own types say too much about the keywords of init
    RayError: Any = import_module("ray.exceptions").RayError
except ImportError as error:
    raise DependencyError("a Ray crew needs Ray: pip install 'tgq-fast[ray]'") from error

__all__ = ["RayCrew"]

_READY_SECONDS = 600
"""How long all actors together may have no place and give no sign before a run ends."""
_STARTS = 3
"""Actors of one worker that may be lost before they are ready, while no worker answers: a killed node takes those that
start with it."""


class RayCrew:
    """`count` actors, each with `cpus` processors and `gpus` GPUs.

    Args:
        address: of the cluster: "local" for one of its own on this machine, "auto" for the one that runs here, or
            "ray://host:port", "host:port".
        cpus, gpus: of each actor. A catalogue's pictures, and the package, must be there on every node.

    Raises:
        WorkerError: no cluster at the address, or one that can never place the actors.
    """

    def __init__(self, count: int, *, address: str, cpus: float = 1, gpus: float = 0) -> None:
        if count < 1:
            raise ArgumentError("workers", count, "at least 1")
        if not address:
            raise ArgumentError("address", repr(address), "'local', 'auto' or the address of a cluster")
        self.count, self._cpus, self._gpus = count, cpus, gpus
        self._actors: dict[int, tuple[Any, Any]] = {}  # and the promise that it is ready
        self._asked: dict[Any, int] = {}
        self._early: Counter[int] = Counter()  # actors of each worker that did not start since one last answered
        self._started = False
        self._owner = not ray.is_initialized()
        if self._owner:
            try:
                own = {"include_dashboard": False} if address == "local" else {}
                ray.init(address=address, log_to_driver=False, **own)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise WorkerError(f"no Ray cluster at {address!r}: {error}") from error
        whole = ray.cluster_resources()
        for name, each in (("CPU", cpus), ("GPU", gpus)):
            if each and whole.get(name, 0) < each:
                have = f"the cluster at {address!r} has {whole.get(name, 0):g} {name}"
                self.close()
                raise WorkerError(f"an actor wants {each:g} {name}, {have}")

    def start(self, job: Job) -> None:
        with _sending("what all tasks have in common"):
            self._job = ray.put(job)

    def give(self, worker: int, task: Any) -> None:
        with _sending("a task"):
            if worker not in self._actors:
                plain = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_task_retries=0)
                actor = plain(Worker).remote(self._job)
                self._actors[worker] = actor, actor.ready.remote()
            self._asked[self._actors[worker][0].do.remote(task)] = worker

    def answer(self, seconds: float | None = None) -> tuple[int, Any] | None:
        limit = seconds if self._started or seconds is not None else _READY_SECONDS
        found, _ = ray.wait(list(self._asked), num_returns=1, timeout=limit)
        if not found and seconds is not None:
            return None
        if not found:
            raise WorkerError(f"no actor was ready within {limit} seconds; is the cluster busy, or too small?")
        worker = self._asked.pop(found[0])
        try:
            answer = ray.get(found[0])
            self._started = True
            self._early.clear()
            return worker, answer
        except RayError as error:
            actor, ready = self._actors.pop(worker)
            self._check_start(worker, ready)
            ray.kill(actor)
            return worker, Lost(f"{type(error).__name__}: {_first_line(error)}")

    def _check_start(self, worker: int, ready: Any) -> None:
        """Tell an actor that did not start from one that was lost with its task."""
        try:
            ray.get(ready)
            self._started = True
        except RayError as error:
            self._early[worker] += 1
            if self._early[worker] >= _STARTS:
                raise WorkerError(f"actor {worker} does not start: {_first_line(error)}") from error

    def stop(self) -> None:
        for actor, _ in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._asked.clear()
        self._started = False

    def close(self) -> None:
        self.stop()
        if self._owner:
            ray.shutdown()


@contextmanager
def _sending(what: str) -> Iterator[None]:
    """WorkerError for what cannot be sent, such as where memory and disk of a node are full."""
    try:
        yield
    except RayError as error:
        raise WorkerError(f"the cluster does not take {what}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
