"""How often something was tried, on disk: a worker or a driver that dies with an item has counted it before.

Source: ours.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tgq_fast.io.files import append_line, open_regular
from tgq_fast.io.json_text import read_json

__all__ = ["Attempts", "Span"]

Span = tuple[str, int, int]
"""(key of a part, first, stop): some of its rows."""


class Attempts:
    """An append-only log of what was begun, what ended well, and which items are refused.

    Args:
        path: JSON lines; made by the first entry. A torn last line is skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: Counter[Span] = Counter()
        self.refused: dict[str, dict[str, tuple[str, str]]] = {}
        self._closed_off = False
        if not path.exists():
            return
        with open_regular(path) as file:
            for line in file:
                try:
                    entry = read_json(line)
                    self._apply(entry)
                except (ValueError, KeyError, TypeError):
                    continue

    def failed(self, span: Span) -> int:
        """How often it was begun and did not end well, since it last did or was given new chances."""
        return self._open[span]

    def begin(self, span: Span) -> None:
        """It is about to be handed to a worker."""
        self._add({"event": "begun", "span": list(span)})

    def end(self, span: Span) -> None:
        """It ended well, or gets new chances."""
        self._add({"event": "ended", "span": list(span)})

    def refuse(self, part: str, item: str, reason: str, detail: str) -> None:
        """An item of a part is left out."""
        self._add({"event": "refused", "part": part, "item": item, "reason": reason, "detail": detail})

    def _add(self, entry: dict[str, Any]) -> None:
        append_line(self.path, json.dumps(entry).encode() + b"\n", close_off=not self._closed_off)
        self._closed_off = True
        self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        if entry["event"] == "refused":
            told = (str(entry["reason"]), str(entry["detail"]))
            self.refused.setdefault(str(entry["part"]), {})[str(entry["item"])] = told
            return
        key, first, stop = entry["span"]
        span = (str(key), int(first), int(stop))
        self._open[span] = self._open[span] + 1 if entry["event"] == "begun" else 0
