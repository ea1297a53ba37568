"""What loading a catalogue found: problems by row, warnings, counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tgq_fast.errors import ImageError

__all__ = ["RejectedRow", "ValidationReport"]

KEPT_MESSAGES = 1_000


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that was left out: file ("metadata" or "pairs"), 1-based row, id if it could be read, reason."""

    file: str
    row: int
    id: str | None
    reason: str

    @property
    def problem(self) -> str:
        """The row and the reason, for people."""
        return f"{'' if self.file == 'metadata' else self.file + ' '}row {self.row}: {self.reason}"


@dataclass
class ValidationReport:
    """Result of validating one catalogue.

    Attributes:
        path: the metadata file.
        rows, items: rows read and items kept.
        pairs: pairs kept (of the pairs file, or implied by group ids).
        problems: "row N: …" / "pairs row N: …", one per row that was refused; at most 1,000 are kept, `problem_count`
            counts all and `rejected` holds all.
        warnings: rows that were kept but altered, or facts that deserve a look (cut text, groups in several splits).
        image_problems: one line per picture that cannot be used; filled by `with_images`.
        missing: field name → items that lack it, for id-bearing columns and every attribute that occurs.
        splits: split → {"pairs", "queries", "items"}.
        leakage: {"items_in_several_splits", "groups_in_several_splits"}.
        rejected: the refused rows.
    """

    path: str
    rows: int = 0
    items: int = 0
    pairs: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    image_problems: list[str] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    leakage: dict[str, int] = field(default_factory=dict)
    rejected: list[RejectedRow] = field(default_factory=list)
    problem_count: int = 0
    warning_count: int = 0

    @property
    def ok(self) -> bool:
        """Whether every row and, if they were checked, every picture can be used."""
        return self.problem_count == 0 and not self.image_problems

    def reject(self, file: str, row: int, item_id: str | None, messages: Iterable[str]) -> None:
        """Record a refused row."""
        rejected = RejectedRow(file, row, item_id, "; ".join(messages))
        self.problem_count += 1
        if len(self.problems) < KEPT_MESSAGES:
            self.problems.append(rejected.problem)
        self.rejected.append(rejected)

    def sort_rows(self) -> None:
        """Bring the refused rows into the order of the file, where they were not found in it."""
        self.rejected.sort(key=lambda rejected: rejected.row)
        self.problems = [rejected.problem for rejected in self.rejected[:KEPT_MESSAGES]]

    def warn(self, message: str) -> None:
        """Record a warning."""
        self.warning_count += 1
        if len(self.warnings) < KEPT_MESSAGES:
            self.warnings.append(message)

    def with_images(self, problems: Iterable[ImageError]) -> ValidationReport:
        """Copy of the report that also lists unusable pictures."""
        return dataclasses.replace(self, image_problems=[*self.image_problems, *map(str, problems)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with the first 1,000 refused rows; a reject file lists them all."""
        shown = dataclasses.replace(self, rejected=self.rejected[:KEPT_MESSAGES])
        return {"ok": self.ok, **dataclasses.asdict(shown)}
