"""The reject log and atomic files under interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tgq_fast.data import Reject, RejectLog
from tgq_fast.errors import ArgumentError, ImageError
from tgq_fast.io.files import atomic_writer, write_atomic


def test_entries_come_back_in_order_without_repeats(tmp_path: Path) -> None:
    log = RejectLog(tmp_path / "deep" / "rejects.jsonl")
    assert list(log) == [] and not log.path.exists()
    log.add_error(ImageError("ü", "x.jpg", "missing"), row=3)
    log.add("b", None, "y.jpg", "truncated", "line\nbreak")
    RejectLog(log.path).add_error(ImageError("ü", "x.jpg", "missing"), row=3)
    assert [(e.item_id, e.row, e.reason) for e in log] == [("ü", 3, "missing"), ("b", None, "truncated")]
    assert len(log) == 2 and len(log.path.read_bytes().splitlines()) == 3


def test_entries_of_numpy_and_of_other_types(tmp_path: Path) -> None:
    log = RejectLog(tmp_path / "rejects.jsonl")
    log.add(np.str_("a"), np.int64(3), tmp_path / "x.jpg", "corrupt")  # type: ignore[arg-type]
    assert list(log) == [Reject("a", 3, str(tmp_path / "x.jpg"), "corrupt")]
    for odd in ({"item_id": 3}, {"row": 1.5}, {"path": None}, {"reason": b"x"}):
        with pytest.raises(ArgumentError, match=f"^{next(iter(odd))}: "):
            log.add(**{"item_id": "a", "row": 1, "path": "x", "reason": "y", **odd})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^path: "):
        RejectLog(3)  # type: ignore[arg-type]


def test_a_torn_last_line_is_closed_off(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    RejectLog(path).add("a", 1, "x", "missing")
    with open(path, "ab") as file:
        file.write(b'{"item_id": "torn", "row"')
    assert [e.item_id for e in RejectLog(path)] == ["a"]
    log = RejectLog(path)
    log.add("b", 2, "y", "missing")
    log.add("c", 3, "z", "missing")
    assert [e.item_id for e in RejectLog(path)] == ["a", "b", "c"]


KILLED = """
import sys
from tgq_fast.data.rejects import RejectLog
log = RejectLog(sys.argv[1])
i = 0
while True:
    log.add(str(i), i, "p", "missing", "x" * 200)
    print(i, flush=True)
    i += 1
"""


def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        last = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows = [entry.row for entry in RejectLog(path)]
    assert rows == list(range(len(rows))) and len(rows) > last


def test_atomic_files_replace_or_stay(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "f.json"
    write_atomic(target, b"one")
    with pytest.raises(RuntimeError), atomic_writer(target) as file:
        file.write(b"two")
        raise RuntimeError
    assert target.read_bytes() == b"one" and os.listdir(target.parent) == ["f.json"]
    with atomic_writer(target) as file:
        file.write(b"three")
        assert target.read_bytes() == b"one"
    assert target.read_bytes() == b"three"
