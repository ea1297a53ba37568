"""The reject log: an append-only JSONL file of the items that a run left out, safe against being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tgq_fast.data.validation import ValidationReport
from tgq_fast.errors import ImageError

__all__ = ["Reject", "RejectLog"]


@dataclass(frozen=True, slots=True)
class Reject:
    """One left-out item: id and row as far as known, file, reason code and detail."""

    item_id: str | None
    row: int | None
    path: str
    reason: str
    detail: str = ""


class RejectLog:
    """Append-only log.

    Each entry is one write of one line to a file opened for appending, followed by fsync: a kill leaves at most one
    torn last line, which reading skips and the next opening closes off. Nothing is created before the first entry.

    Args:
        path: the JSONL file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._closed_off = False

    def add(self, item_id: str | None, row: int | None, path: str | Path, reason: str, detail: str = "") -> None:
        """Append one entry."""
        entry = Reject(item_id, row, str(path), reason, detail)
        line = json.dumps(asdict(entry), ensure_ascii=True).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if not self._closed_off:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line
                self._closed_off = True
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)

    def add_error(self, error: ImageError, row: int | None = None) -> None:
        """Append an `ImageError`."""
        self.add(error.item_id, row, error.path, error.reason, str(error))

    def add_report(self, report: ValidationReport) -> None:
        """Append every row that loading a catalogue refused."""
        for rejected in report.rejected:
            self.add(rejected.id, rejected.row, report.path, f"{rejected.file}_row", rejected.reason)

    def __iter__(self) -> Iterator[Reject]:
        """Distinct entries in order; a resumed run may have written one twice. Torn or foreign lines are skipped."""
        if not self.path.exists():
            return
        seen: set[tuple[str | None, int | None, str, str]] = set()
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    entry = Reject(**json.loads(line))
                except (ValueError, TypeError, RecursionError):
                    continue
                key = (entry.item_id, entry.row, entry.path, entry.reason)
                if key not in seen:
                    seen.add(key)
                    yield entry

    def __len__(self) -> int:
        return sum(1 for _ in self)
