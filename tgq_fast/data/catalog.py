"""The catalogue: a folder in the Hugging Face imagefolder convention, read into typed rows and checked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tgq_fast.data.columns import PICTURE_COLUMNS, Columns
from tgq_fast.data.items import COLUMNS, Item, RowError, parse_item, read_identifier
from tgq_fast.data.pairs import (
    SPLITS,
    UNSPLIT,
    Pairs,
    PairSet,
    components,
    group_pairs,
    make_pairs,
    read_pairs,
    split_code,
    split_of_components,
)
from tgq_fast.data.parquet_rows import ParquetPictures
from tgq_fast.data.pictures import Picture, PictureSource, picture_of
from tgq_fast.data.rows import SUFFIXES, read_rows, table_parts
from tgq_fast.data.shown import catalog_html
from tgq_fast.data.validation import ValidationReport
from tgq_fast.errors import ArgumentError, CatalogError

__all__ = ["Catalog", "Policy", "stream_items"]

Policy = Literal["raise", "skip"]


def find_table(folder: Path, stem: str) -> Path | None:
    """`<folder>/<stem>.jsonl|csv|parquet` (or .gz), or a folder `<stem>` of parts; None if there is none.

    Raises:
        CatalogError: there are several.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").exists()]
    if (parts := folder / stem).is_dir() and table_parts(parts):
        found.append(parts)
    if len(found) > 1:
        raise CatalogError(folder, [f"several {stem} files: {', '.join(p.name for p in found)}"], "Keep one of them.")
    return found[0] if found else None


def metadata_file(path: str | Path) -> Path:
    """The metadata that `path` means: a catalogue folder, its metadata file, or a folder of Parquet parts.

    Raises:
        CatalogError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = find_table(path, "metadata")
        for folder in (path, path / "data"):  # parts as `datasets` and the hub write them
            if found is None and folder.is_dir() and any(part.suffix == ".parquet" for part in table_parts(folder)):
                found = folder
        if found is None:
            names = ", ".join(f"metadata{suffix}" for suffix in SUFFIXES)
            hint = "`tgq-fast import` converts a shop's export, a table, a folder of pictures or a public data set."
            raise CatalogError(path, [f"no {names} in the folder"], hint)
        return found
    if not path.exists():
        raise CatalogError(path, ["no such file or folder"])
    return path


def catalog_root(metadata: Path, given: Path) -> Path:
    """The folder that file names are relative to."""
    if metadata.is_dir() and metadata == given:
        return metadata
    return metadata.parent


def stream_items(path: str | Path, report: ValidationReport) -> Iterator[Item]:
    """Read a metadata file row by row; refused rows and warnings go to `report`. Memory holds the ids, not the rows.

    Raises:
        CatalogError: the file is unreadable, or holds pictures in a column of which no item's picture is read.
    """
    yield from items_of_rows(read_rows(Path(path), required=("id", *PICTURE_COLUMNS)), path, report)


def items_of_rows(
    rows: Iterable[tuple[int, Mapping[Any, Any] | RowError]], path: str | Path, report: ValidationReport
) -> Iterator[Item]:
    """:func:`stream_items` of rows from anywhere."""
    first_row: dict[str, int] = {}
    columns = Columns()
    pictures = False
    for number, raw in rows:
        report.rows += 1
        if isinstance(raw, RowError):
            report.reject("metadata", number, None, raw.messages)
            continue
        row = columns.read(raw)
        try:
            item, notes = parse_item(row, number)
        except RowError as error:
            report.reject("metadata", number, read_identifier("id", row.get("id"), []), error.messages)
            continue
        seen = first_row.setdefault(item.id, number)
        if seen != number:
            report.reject("metadata", number, item.id, [f"id {item.id!r} was already used in row {seen}"])
            continue
        for note in notes:
            report.warn(f"row {number}: {note}")
        report.items += 1
        pictures |= item.file_name is not None
        yield item
    _report_columns(columns, pictures, path, report)


def _report_columns(columns: Columns, pictures: bool, path: str | Path, report: ValidationReport) -> None:
    held = ", ".join(sorted(columns.pictures)[:20])
    if held and not pictures and report.items:
        hint = "Call the column file_name, or `tgq-fast import table --map file_name=<column>`."
        raise CatalogError(path, [f"column(s) {held} hold pictures, but no item has a file_name"], hint)
    extra = sorted(columns.unknown)
    if extra:
        names = ", ".join(extra[:20]) + (f" and {len(extra) - 20} more" if len(extra) > 20 else "")
        report.warn(f"column(s) {names} are not part of the schema and are ignored; name one attributes.… to keep it")
    if held and pictures:
        report.warn(f"column(s) {held} hold pictures that are not used: an item has one picture, its file_name")
    if columns.more:
        report.warn(f"{columns.more} row(s) name several pictures: the first is used")


@dataclass(frozen=True, eq=False)
class Catalog:
    """Items, pairs and what validation found.

    Attributes:
        root: folder that `file_name` is relative to.
        items: every usable row, in file order; an item's position is its index everywhere else.
        source: where pictures lie that are no files of their own, or None.
        pairs: the pairs file, or None when there is none.
        report: what was refused, altered or is missing.
    """

    root: Path
    items: tuple[Item, ...]
    pairs: Pairs | None
    report: ValidationReport
    source: PictureSource | None = field(repr=False, default=None)
    _index: dict[str, int] = field(repr=False, default_factory=dict)
    _cache: dict[str, NDArray[np.int64] | NDArray[np.int8]] = field(repr=False, default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, *, policy: Policy = "raise", pairs_policy: Policy | None = None) -> Catalog:
        """Read and check a catalogue.

        Args:
            path: folder with metadata.jsonl|csv|parquet and optional pairs.jsonl|csv|parquet (.jsonl and .csv also as
                .gz, and each also as a folder of parts), or the metadata file. A Parquet column with the bytes of
                pictures (`image` struct{bytes, path}) is read from the file when a picture is asked for.
            policy: "raise" refuses a catalogue with any problem row; "skip" leaves those rows out and reports them.
            pairs_policy: the same for rows of the pairs file; None: `policy`.

        Raises:
            CatalogError: nothing usable, or problems under policy "raise"; lists them with row numbers.
        """
        if policy not in ("raise", "skip"):
            raise ArgumentError("policy", repr(policy), "'raise' or 'skip'")
        metadata = metadata_file(path)
        root = catalog_root(metadata, Path(path))
        report = ValidationReport(str(metadata))
        items = list(stream_items(metadata, report))
        index = {item.id: i for i, item in enumerate(items)}
        pairs_file = find_table(root, "pairs")
        pairs = None
        if pairs_file is not None:
            rejected = frozenset(r.id for r in report.rejected if r.id is not None and r.id not in index)
            pairs = _load_pairs(pairs_file, index, rejected, report)
        stops = {"metadata": policy, "pairs": pairs_policy or policy}
        if any(stops[rejected.file] == "raise" for rejected in report.rejected):
            hint = "Mend the rows, or load with policy 'skip' to leave them out."
            raise CatalogError(metadata, report.problems, hint)
        if not items:
            raise CatalogError(metadata, report.problems or ["no rows"])
        catalog = cls(root, tuple(items), pairs, report, _tables_of(metadata), index)
        catalog._count()
        return catalog

    @classmethod
    def from_items(
        cls,
        items: Sequence[Item],
        *,
        root: str | Path = ".",
        source: PictureSource | None = None,
        report: ValidationReport | None = None,
    ) -> Catalog:
        """A catalogue of items in memory (no pairs file); CatalogError for duplicate ids."""
        report = ValidationReport("<memory>", rows=len(items), items=len(items)) if report is None else report
        index = {item.id: i for i, item in enumerate(items)}
        if len(index) != len(items):
            twice = [item_id for item_id, count in Counter(item.id for item in items).items() if count > 1]
            raise CatalogError("<memory>", [f"id {item_id!r} appears more than once" for item_id in twice])
        catalog = cls(Path(root), tuple(items), None, report, source, index)
        catalog._count()
        return catalog

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[Any, Any]],
        *,
        root: str | Path = ".",
        columns: Mapping[str, str] | None = None,
        policy: Policy = "raise",
    ) -> Catalog:
        """A catalogue of rows in memory; columns of other names than the schema's become attributes.

        Args:
            records: mappings of column to value; `file_name` or `image` may be a path, the bytes of a picture file, a
                Pillow picture, an array, or a struct {bytes, path}.
            root: folder that relative paths refer to.
            columns: the schema's name → the records' own, such as {"id": "sku"}.
            policy: as in :meth:`load`.

        Raises:
            CatalogError: nothing usable, or problems under policy "raise"; lists them with row numbers.
        """
        from tgq_fast.data.frames import from_records

        return from_records(records, root=root, columns=columns, policy=policy)

    @classmethod
    def from_pandas(cls, frame: Any, **options: Any) -> Catalog:
        """A catalogue of a pandas data frame, whose index counts as a column if it has a name.

        The options are those of :meth:`from_records`.
        """
        from tgq_fast.data.frames import from_pandas

        return from_pandas(frame, **options)

    @classmethod
    def from_dataset(cls, dataset: Any, **options: Any) -> Catalog:
        """A catalogue of a `datasets.Dataset`, or of a DatasetDict with its splits as the attribute `split`.

        Class labels become their names; pictures stay encoded as they are stored. The options are those of
        :meth:`from_records`.
        """
        from tgq_fast.data.frames import from_dataset

        return from_dataset(dataset, **options)

    def part(self, items: Sequence[Item]) -> Catalog:
        """A catalogue of some of the items, with the same folder and pictures and without pairs."""
        return Catalog.from_items(items, root=self.root, source=self.source)

    def _repr_html_(self) -> str:
        return catalog_html(self)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._index

    @property
    def ids(self) -> list[str]:
        """Item ids in index order."""
        return [item.id for item in self.items]

    def index(self, item_id: str) -> int:
        """Position of an item; ArgumentError if there is no such id."""
        try:
            return self._index[item_id]
        except KeyError:
            raise ArgumentError(
                "item_id", repr(item_id), f"an id of the {len(self.items)} items in {self.root}"
            ) from None

    def image_path(self, item: Item) -> Path:
        """Where the item's picture lies, for messages ("<table>#<row>" in a table); ArgumentError without one."""
        return self.picture(item).path

    def picture(self, item: Item) -> Picture:
        """The item's picture, for :func:`load_image`; ArgumentError for an item without one."""
        if item.file_name is None:
            raise ArgumentError("item", repr(item.id), "an item with a file_name")
        return picture_of(self.root, item.file_name, self.source)

    def field_names(self) -> list[str]:
        """Metadata fields that at least one item has: columns first, then attributes by name."""
        names = [name for name in COLUMNS if any(item.field(name) is not None for item in self.items)]
        attributes = {name for item in self.items for name in item.attributes} - set(COLUMNS)
        return names + sorted(attributes)

    def components(self) -> NDArray[np.int64]:
        """[n] int64 connected component of each item over group ids and pairs; an item with neither is alone."""
        if "components" not in self._cache:
            none = np.empty(0, np.int64)
            query, target = (none, none) if self.pairs is None else (self.pairs.query, self.pairs.target)
            self._cache["components"] = components(len(self.items), [i.group_id for i in self.items], query, target)
        return self._cache["components"].astype(np.int64, copy=True)

    def split_pairs(self, split: str, *, every: bool = False) -> PairSet:
        """Positive pairs of "train", "validation" or "test".

        Without a pairs file the ordered pairs of a group count. Pairs that name no split fall 80/10/10 by a hash of
        their component, so that no item is in two splits.

        Args:
            every: all mates of a query, as a ranking needs them: one that is left out would count as a wrong answer.
                Without it, large groups give each query its next 32 mates, enough to train on.
        """
        code = split_code(split)
        pairs = self._all_pairs(every=every)
        return pairs.select(pairs.split == code)

    def digest(self) -> str:
        """sha256 of the rows and pairs in canonical form; independent of the file format, not of the order."""
        state = hashlib.sha256()
        for item in self.items:
            state.update(json.dumps(item.to_dict(), sort_keys=True, ensure_ascii=True).encode() + b"\n")
        if self.pairs is not None:
            for name in ("query", "target", "split", "weight"):
                array = getattr(self.pairs, name)
                state.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
        return state.hexdigest()

    def _all_pairs(self, *, every: bool = False) -> Pairs:
        if self.pairs is not None:
            pairs = self.pairs
        else:
            query, target = group_pairs([item.group_id for item in self.items], every=every)
            pairs = Pairs(query, target, np.ones(len(query), np.float32), np.full(len(query), UNSPLIT, np.int8))
        if not (pairs.split == UNSPLIT).any():
            return pairs
        if "splits" not in self._cache:
            self._cache["splits"] = split_of_components(self.components(), self.ids)
        split = np.where(pairs.split == UNSPLIT, self._cache["splits"][pairs.query], pairs.split).astype(np.int8)
        return Pairs(pairs.query, pairs.target, pairs.weight, split)

    def _count(self) -> None:
        """Fill the report's counts: missing fields, splits, leakage."""
        report, n = self.report, len(self.items)
        present: Counter[str] = Counter(name for item in self.items for name in item.attributes)
        for name in ("file_name", "group_id", *COLUMNS):
            present[name] = sum(getattr(item, name) is not None for item in self.items)
        report.missing = {name: n - count for name, count in sorted(present.items())}
        pairs = self._all_pairs()
        report.pairs = len(pairs)
        in_split = np.zeros((len(SPLITS), n), bool)
        for code, name in enumerate(SPLITS):
            chosen = pairs.select(pairs.split == code)
            in_split[code, chosen.query] = in_split[code, chosen.target] = True
            queries = len(np.unique(chosen.query))
            report.splits[name] = {"pairs": len(chosen), "queries": queries, "items": int(in_split[code].sum())}
        items = int((in_split.sum(0) > 1).sum())
        seen: dict[str, set[int]] = {}
        for code, i in zip(*np.nonzero(in_split), strict=True):
            group = self.items[i].group_id
            if group is not None:
                seen.setdefault(group, set()).add(int(code))
        groups = sum(len(codes) > 1 for codes in seen.values())
        report.leakage = {"items_in_several_splits": items, "groups_in_several_splits": groups}
        if items:
            report.warn(f"{items} item(s) occur in pairs of several splits: test figures will be too good")
        if groups:
            report.warn(f"{groups} group(s) have items in several splits: test products are seen in training")


def _tables_of(metadata: Path) -> PictureSource | None:
    """Pictures that lie in the metadata's own Parquet files."""
    parts = table_parts(metadata) if metadata.is_dir() else [metadata]
    if not parts or parts[0].suffix.lower() != ".parquet":
        return None
    return ParquetPictures({f"{metadata.name}/{p.name}" if metadata.is_dir() else p.name: p for p in parts})


def _load_pairs(path: Path, index: dict[str, int], rejected: frozenset[str], report: ValidationReport) -> Pairs:
    rows: dict[tuple[int, int, int], tuple[int, int, float, int]] = {}
    repeated = dropped = 0
    for number, row in read_pairs(path, index, rejected):
        if isinstance(row, RowError):
            report.reject("pairs", number, None, row.messages)
        elif row is None:
            dropped += 1
        else:
            key = (row[0], row[1], row[3])
            repeated += key in rows
            rows.setdefault(key, row)
    if repeated:
        report.warn(f"{repeated} pair(s) repeat an earlier one and were left out")
    if dropped:
        report.warn(f"{dropped} pair(s) name an item whose row was refused and were left out")
    return make_pairs(list(rows.values()))
