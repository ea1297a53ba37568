"""What the importers share: the catalogue writer, picture placement, the import report."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, TextIO, cast

from tgq_fast.data.columns import PICTURE_SUFFIXES
from tgq_fast.data.items import Item, RowError, parse_item
from tgq_fast.data.rows import SUFFIXES
from tgq_fast.errors import ArgumentError
from tgq_fast.io.files import fsync_folder, locked, make_folder, writing

__all__ = ["CatalogWriter", "Full", "ImagePlacement", "ImportReport", "image_index", "open_text", "suffix_of_content"]

ImagePlacement = Literal["link", "copy"]
KEPT_EXAMPLES = 200


class Full(Exception):
    """The item limit is reached: importers let it pass through."""


@dataclass
class ImportReport:
    """Result of an import.

    Attributes:
        source, out: what was imported, where to.
        items, pairs: rows written; pairs 0 means that groups, if any, will be paired when the catalogue is loaded.
        groups: distinct group ids of at least two items.
        linked, copied: pictures placed as hard links and as copies.
        skipped: reason → count of entries left out.
        examples: "row N: reason" for the first of them.
        notes: facts about the whole data set.
    """

    source: str
    out: str
    items: int = 0
    pairs: int = 0
    groups: int = 0
    linked: int = 0
    copied: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)


class CatalogWriter:
    """Context manager that writes images/, pairs.jsonl and metadata.jsonl.

    Rows stream into temporary files; metadata.jsonl gets its name last, so an interrupted import leaves no catalogue
    that looks whole.

    Args:
        source: name for the report.
        out: folder to create.
        limit: `add` raises `Full` once this many items are written.
        placement: how pictures get into the folder.
    """

    def __init__(self, source: str, out: str | Path, *, limit: int | None, placement: ImagePlacement) -> None:
        if placement not in ("link", "copy"):
            raise ArgumentError("copy", repr(placement), "'link' or 'copy'")
        if limit is not None and limit < 1:
            raise ArgumentError("limit", limit, "at least 1")
        self.out, self.limit, self.placement = Path(out), limit, placement
        self._refuse_catalogue()
        self.report = ImportReport(source, str(out))
        self._files: dict[str, BinaryIO] = {}
        self._ids: set[str] = set()
        self._names: set[str] = set()
        self._groups: dict[str, int] = {}
        self._lock = contextlib.ExitStack()

    def _refuse_catalogue(self) -> None:
        if any((self.out / f"metadata{suffix}").exists() for suffix in SUFFIXES):
            hint = "Remove the old one or choose another."
            raise ArgumentError("out", str(self.out), "a folder without a catalogue", hint)

    def __enter__(self) -> CatalogWriter:
        make_folder(self.out / "images")
        with contextlib.ExitStack() as stack:
            lock = self.out / ".import.lock"
            if not stack.enter_context(locked(lock, wait=False)):
                raise ArgumentError("out", str(self.out), "a folder that no other import is writing", "Choose another.")
            stack.callback(lock.unlink, missing_ok=True)  # by its holder, before it lets go, however the import ends
            self._refuse_catalogue()  # another import may have finished since this one began
            for stem in ("metadata", "pairs"):
                with writing(self.out):
                    self._files[stem] = open(self.out / f".{stem}.jsonl.part", "wb")
            self._lock = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        with self._lock, writing(self.out):
            return self._finish(error)

    def _finish(self, error: BaseException | None) -> bool:
        stopped = isinstance(error, Full)
        whole = error is None or stopped
        parts = {stem: self.out / f".{stem}.jsonl.part" for stem in self._files}
        try:
            if whole:
                for file in self._files.values():
                    file.flush()
                    os.fsync(file.fileno())
                for stem in reversed(parts):  # pairs first, metadata last
                    if stem == "metadata" or self.report.pairs:
                        os.replace(parts[stem], self.out / f"{stem}.jsonl")
        finally:
            for stem, file in self._files.items():
                with contextlib.suppress(OSError):  # a full disk refuses what is buffered once more
                    file.close()
                parts[stem].unlink(missing_ok=True)
        self.report.groups = sum(count > 1 for count in self._groups.values())
        if stopped:
            self.report.notes.append(f"stopped at the limit of {self.limit} items")
        if whole:
            fsync_folder(self.out)
            shutil.rmtree(self.out / ".downloads", ignore_errors=True)
        return stopped

    def skip(self, row: int, reason: str, detail: str = "") -> None:
        """Count an entry that is left out."""
        self.report.skipped[reason] = self.report.skipped.get(reason, 0) + 1
        if len(self.report.examples) < KEPT_EXAMPLES:
            self.report.examples.append(f"row {row}: {reason}" + (f" ({detail[:120]})" if detail else ""))

    def add(self, row: int, raw: Mapping[str, Any], image: Path | bytes) -> bool:
        """Write one item; False (and a line in the report) if it breaks the schema, repeats an id or lacks its picture.

        Args:
            row: 1-based row of the source, for the report.
            raw: columns without file_name.
            image: the source picture or its bytes, placed as images/<id><suffix>.

        Raises:
            Full: the limit is reached.
        """
        if self.limit is not None and self.report.items >= self.limit:
            raise Full
        if isinstance(image, Path) and not image.is_file():
            self.skip(row, "picture missing", str(image))
            return False
        try:
            item, _ = parse_item(raw, row)
        except RowError as error:
            self.skip(row, "broken row", str(error))
            return False
        if item.id in self._ids:
            self.skip(row, "duplicate id", item.id)
            return False
        self._ids.add(item.id)
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in item.id)
        safe = safe[:150]
        suffix = image.suffix.lower() if isinstance(image, Path) else suffix_of_content(image)
        name = f"images/{safe}{suffix}"
        if name.casefold() in self._names:  # ids that differ only in what a file name cannot carry
            name = f"images/{safe}-{len(self._names)}{suffix}"
        self._names.add(name.casefold())
        with writing(self.out / name):
            self._place(image, self.out / name)
        self._write("metadata", dataclasses.replace(item, file_name=name))
        if item.group_id is not None:
            self._groups[item.group_id] = self._groups.get(item.group_id, 0) + 1
        self.report.items += 1
        return True

    def add_pair(self, query: str, target: str, split: str) -> None:
        """Write one pair of items already added; others are ignored."""
        if query in self._ids and target in self._ids and query != target:
            self._line("pairs", {"query": query, "target": target, "split": split})
            self.report.pairs += 1

    def _write(self, stem: str, item: Item) -> None:
        self._line(stem, item.to_dict())

    def _line(self, stem: str, row: Mapping[str, Any]) -> None:
        with writing(self.out):
            self._files[stem].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def _place(self, image: Path | bytes, target: Path) -> None:
        # It may be left by an import that was interrupted before metadata.jsonl appeared.
        target.unlink(missing_ok=True)
        if isinstance(image, bytes):
            target.write_bytes(image)
            self.report.copied += 1
            return
        if self.placement == "link":
            try:
                os.link(image.resolve(), target)
                self.report.linked += 1
                return
            except OSError:  # other file system, or one without hard links
                pass
        shutil.copyfile(image, target)
        self.report.copied += 1


def suffix_of_content(data: bytes) -> str:
    """File suffix of a picture by its first bytes; ".img" for kinds that need none."""
    if data[:3] == b"\xff\xd8\xff":
        return ".jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return {b"\x89PNG": ".png", b"GIF8": ".gif"}.get(data[:4], ".avif" if data[4:8] == b"ftyp" else ".img")


def open_text(path: Path) -> TextIO:
    """A UTF-8 text file, unpacked if its name ends in .gz."""
    if path.suffix == ".gz":
        return cast("TextIO", gzip.open(path, "rt", encoding="utf-8", newline=""))
    return open(path, encoding="utf-8", newline="")


def image_index(folder: Path) -> dict[str, Path]:
    """Stem → picture of a folder and its subfolders."""
    return {path.stem: path for path in _walk(folder) if path.suffix.lower() in PICTURE_SUFFIXES}


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            yield Path(base, name)
