"""Runs commands as steps of a longer check: each with a time limit and a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.environment import ROOT

_TAIL = 4000


def run_step(
    name: str, command: Sequence[str], *, limit_s: float, extra: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run one command to its end or its limit; nothing it starts outlives it.

    Args:
        extra: environment variables to add.

    Returns:
        {"name", "status", "seconds", "command", "returncode", "tail"}; status is "ok", "failed", "timeout", or
        "skipped" when the program is not there.
    """
    begin = time.monotonic()
    step: dict[str, Any] = {"name": name, "command": " ".join(command), "limit_s": round(limit_s)}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path(), **(extra or {})}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            return {**step, "status": "skipped", "seconds": 0.0, "returncode": None, "tail": str(error)}
        try:
            code = process.wait(timeout=limit_s)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timeout"
        finally:
            _end(process)
        log.seek(0)
        tail = log.read()[-_TAIL:]
    return {**step, "status": status, "seconds": round(time.monotonic() - begin, 1), "returncode": code, "tail": tail}


def _end(process: subprocess.Popen[Any]) -> None:
    """End the step's whole process group, its own children included."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
