"""Runs commands as steps of a longer check: each with a time limit and a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

_TAIL = 4000
_LOG_BYTES = 2 << 20  # of one step in the log file
_GRACE_S = (10, 5)  # after an interrupt, on which pytest still tells what failed, and after asking to end


def run_step(
    name: str,
    command: Sequence[str],
    *,
    limit_s: float,
    extra: Mapping[str, str] | None = None,
    log_file: Path | None = None,
) -> dict[str, Any]:
    """Run one command to its end or its limit; nothing it starts outlives it.

    Args:
        extra: environment variables to add.
        log_file: file to which the command and what it printed are appended.

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
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
                preexec_fn=_hear_interrupts,
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
        printed = log.read()
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"==== {name}: {step['command']}\n{printed[-_LOG_BYTES:]}\n==== {status}, returned {code}\n")
    seconds = round(time.monotonic() - begin, 1)
    return {**step, "status": status, "seconds": seconds, "returncode": code, "tail": printed[-_TAIL:]}


def _hear_interrupts() -> None:
    """A shell starts background jobs deaf to interrupts, and what they start inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[Any]) -> None:
    """End the step's whole process group, its own children included."""
    for kind, grace in zip((signal.SIGINT, signal.SIGTERM), _GRACE_S):
        if process.poll() is not None:
            return
        os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
