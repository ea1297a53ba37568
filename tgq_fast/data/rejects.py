"""The reject log: an append-only JSONL file of the items that a run left out, safe against being killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tgq_fast.arguments import checked
from tgq_fast.data.validation import ValidationReport
from tgq_fast.errors import ImageError
from tgq_fast.io.files import append_line, open_regular
from tgq_fast.io.json_text import read_json

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

    @checked
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._closed_off = False

    @checked
    def add(self, item_id: str | None, row: int | None, path: str | Path, reason: str, detail: str = "") -> None:
        """Append one entry."""
        entry = Reject(item_id, None if row is None else int(row), str(path), reason, detail)
        line = json.dumps(asdict(entry), ensure_ascii=True).encode() + b"\n"
        append_line(self.path, line, close_off=not self._closed_off)
        self._closed_off = True

    def add_error(self, error: ImageError, row: int | None = None) -> None:
        """Append an `ImageError`."""
        self.add(error.item_id, row, error.path, error.reason, str(error))

    def add_report(self, report: ValidationReport) -> None:
        """Append every row that loading a catalogue refused, unless an earlier run has listed it."""
        known = {(r.row, r.path, r.reason) for r in self}
        lines = []
        for rejected in report.rejected:
            reason = f"{rejected.file}_row"
            if (rejected.row, report.path, reason) not in known:
                entry = Reject(rejected.id, rejected.row, report.path, reason, rejected.reason)
                lines.append(json.dumps(asdict(entry), ensure_ascii=True).encode() + b"\n")
        for start in range(0, len(lines), 1000):  # one sync per thousand
            append_line(self.path, b"".join(lines[start : start + 1000]), close_off=not self._closed_off)
            self._closed_off = True

    def __iter__(self) -> Iterator[Reject]:
        """Distinct entries in order; a resumed run may have written one twice. Torn or foreign lines are skipped."""
        if not self.path.is_file():
            return
        seen: set[tuple[str | None, int | None, str, str]] = set()
        with open_regular(self.path) as file:
            for line in file:
                try:
                    entry = Reject(**read_json(line))
                except (ValueError, TypeError):
                    continue
                key = (entry.item_id, entry.row, entry.path, entry.reason)
                if key not in seen:
                    seen.add(key)
                    yield entry

    def __len__(self) -> int:
        return sum(1 for _ in self)
