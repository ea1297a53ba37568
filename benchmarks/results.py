"""Result files: one JSON document per run, rewritten atomically after every case so that a time-out loses one case."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tgq_fast.io.files import write_atomic

SCHEMA = 1
OK = "ok"
_TIMES = ("median_ms", "p20_ms", "p80_ms", "gb_s", "tflop_s", "floor_share")


class ResultFileError(ValueError):
    """A result file that cannot be read or does not follow the schema."""


@dataclass
class Results:
    """One result document.

    Attributes:
        environment: see :func:`benchmarks.environment.environment`.
        ceilings: measured copy bandwidth and matrix rates of this run.
        steps: what `gpu_check` did besides the registry, one object per step.
        rows: one object per case and variant; `status` is "ok", "parity", "skipped" or "failed", and only "ok" rows
            carry times.
        complete: False until the run reached its end.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it replaces an earlier one of the same case and variant."""
        if row["status"] != OK and any(name in row for name in _TIMES):
            raise ResultFileError(f"{row['case']}, {row['variant']}: a row that is {row['status']} must carry no speed")
        key = row["case"], row["variant"]
        self.rows = [r for r in self.rows if (r["case"], r["variant"]) != key]
        self.rows.append(row)

    def save(self, path: str | Path) -> None:
        """Write to `path`, whole or not at all."""
        document = {"schema": SCHEMA, **_finite(vars(self))}
        write_atomic(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a result file.

        Raises:
            ResultFileError: not JSON, another schema, or a row that shows a speed without passing parity.
        """
        try:
            document = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ResultFileError(f"{path}: {error}") from error
        if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
            raise ResultFileError(f"{path}: not a result file of schema {SCHEMA}")
        rows = document.pop("rows", [])
        results = cls(**document)
        for row in rows:
            results.add(row)
        return results


def result_files(folder: str | Path) -> Iterator[tuple[Path, Results]]:
    """Complete result files of every device folder below `folder` (any, if none is complete), oldest first, each with
    the cases that no newer one has: together the newest measurement of each case.

    Runs over small stand-in shapes are no results and are passed over.
    """
    for device in sorted(p for p in Path(folder).glob("*") if p.is_dir()):
        loaded = [(path, Results.load(path)) for path in sorted(device.glob("*.json"))]
        loaded = [item for item in loaded if not item[1].environment.get("tiny")]
        whole = [item for item in loaded if item[1].complete] or loaded
        found: list[tuple[Path, Results]] = []
        seen = set[str]()
        for path, results in sorted(whole, key=lambda item: item[1].environment.get("started", ""), reverse=True):
            rows = [row for row in results.rows if row["case"] not in seen]
            seen |= {row["case"] for row in rows}
            if rows or not found:
                found.append((path, replace(results, rows=rows)))
        yield from reversed(found)


def _finite(value: Any) -> Any:
    """NaN and infinity become null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
