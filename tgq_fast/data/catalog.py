"""The catalogue: a folder in the Hugging Face imagefolder convention, read into typed rows and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tgq_fast.arguments import checked
from tgq_fast.data.item_table import ItemTable
from tgq_fast.data.items import Item
from tgq_fast.data.loading import (
    catalog_root,
    embedded_pictures,
    find_table,
    listed_parts,
    load_pairs,
    metadata_file,
    read_metadata,
    repeated,
)
from tgq_fast.data.pairs import (
    SPLITS,
    UNSPLIT,
    Pairs,
    PairSet,
    components,
    group_pairs,
    split_code,
    split_of_components,
)
from tgq_fast.data.pictures import MemoryPictures, Picture, PictureSource, picture_of
from tgq_fast.data.shown import catalog_html
from tgq_fast.data.validation import ValidationReport
from tgq_fast.errors import ArgumentError, CatalogError
from tgq_fast.io.places import Place, place

__all__ = ["Catalog", "Policy"]

Policy = Literal["raise", "skip"]


@dataclass(frozen=True, eq=False)
class Catalog:
    """Items, pairs and what validation found.

    Attributes:
        root: folder that `file_name` is relative to.
        items: every usable row, in file order; an item's position is its index everywhere else. An :class:`Item` is
            made when it is asked for: of many items, read a column.
        source: where pictures lie that are no files of their own, or None.
        pairs: the pairs file, or None when there is none.
        report: what was refused, altered or is missing.
    """

    root: Path
    items: ItemTable
    pairs: Pairs | None
    report: ValidationReport
    source: PictureSource | None = field(repr=False, default=None)
    _cache: dict[str, Any] = field(repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", ItemTable.of(self.items))

    @classmethod
    def load(
        cls, path: str | Path | Sequence[str | Path], *, policy: Policy = "raise", pairs_policy: Policy | None = None
    ) -> Catalog:
        """Read and check a catalogue.

        Args:
            path: folder with metadata.jsonl|csv|parquet|tar and optional pairs.jsonl|csv|parquet (.jsonl and .csv also
                as .gz, and each also as a folder of parts), or the metadata file, or a folder or list of Parquet files
                or WebDataset shards; in an object store, too ("s3://bucket/shop"). Pictures in Parquet (`image`
                struct{bytes, path}) and in tar files are read when they are asked for.
            policy: "raise" refuses a catalogue with any problem row; "skip" leaves those rows out and reports them.
            pairs_policy: the same for rows of the pairs file; None: `policy`.

        Raises:
            CatalogError: nothing usable, or problems under policy "raise"; lists them with row numbers.
        """
        if policy not in ("raise", "skip"):
            raise ArgumentError("policy", repr(policy), "'raise' or 'skip'")
        metadata: Place | dict[str, Place]
        if isinstance(path, (str, Path)):
            metadata = metadata_file(path)
            root, name = catalog_root(metadata, place(path)), str(metadata)
        else:
            if not isinstance(path, Iterable) or not all(isinstance(one, (str, Path)) for one in path):
                raise ArgumentError("path", f"a {type(path).__name__}", "a folder, a file, or a list of files")
            root, metadata = listed_parts(path)
            name = str(root)
        report = ValidationReport(name)
        items = read_metadata(metadata, report)
        pairs_file = find_table(root, "pairs")
        pairs = None if pairs_file is None else load_pairs(pairs_file, items.text("id"), report)
        stops = {"metadata": policy, "pairs": pairs_policy or policy}
        if any(stops[rejected.file] == "raise" for rejected in report.rejected):
            hint = "Mend the rows, or load with policy 'skip' to leave them out."
            raise CatalogError(name, report.problems, hint)
        if not items:
            raise CatalogError(name, report.problems or ["no rows"])
        catalog = cls(Path(root), items, pairs, report, embedded_pictures(metadata))
        catalog._count()
        return catalog

    @classmethod
    @checked
    def from_items(
        cls,
        items: Sequence[Item],
        *,
        root: str | Path = ".",
        source: PictureSource | None = None,
        report: ValidationReport | None = None,
    ) -> Catalog:
        """A catalogue of items in memory (no pairs file); CatalogError for duplicate ids."""
        table = ItemTable.of(items)
        report = ValidationReport("<memory>", rows=len(table), items=len(table)) if report is None else report
        again, _ = repeated(table.text("id"))
        if len(again):
            twice = table.text("id").take(pa.array(again)).unique().to_pylist()
            raise CatalogError("<memory>", [f"id {item_id!r} appears more than once" for item_id in twice])
        catalog = cls(Path(root), table, None, report, source)
        catalog._count()
        return catalog

    @classmethod
    @checked
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

    def part(self, items: Sequence[Item], *, alone: bool = False) -> Catalog:
        """A catalogue of some of the items, with the same folder and pictures and without pairs.

        Args:
            alone: of pictures in memory it has those of these items only, so that it can be sent elsewhere.
        """
        source = self.source
        if alone and isinstance(source, MemoryPictures):
            source = source.part(item.file_name for item in items)
        return Catalog.from_items(items, root=self.root, source=source)

    def _repr_html_(self) -> str:
        return catalog_html(self)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._index()

    @property
    def ids(self) -> list[str]:
        """Item ids in index order."""
        ids: list[str] = self.items.text("id").to_pylist()
        return ids

    def _index(self) -> dict[str, int]:
        if "index" not in self._cache:
            self._cache["index"] = {item_id: row for row, item_id in enumerate(self.ids)}
        index: dict[str, int] = self._cache["index"]
        return index

    def index(self, item_id: str) -> int:
        """Position of an item; ArgumentError if there is no such id."""
        try:
            return self._index()[item_id]
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
        return self.items.field_names()

    def components(self) -> NDArray[np.int64]:
        """[n] int64 connected component of each item over group ids and pairs; an item with neither is alone."""
        if "components" not in self._cache:
            none = np.empty(0, np.int64)
            query, target = (none, none) if self.pairs is None else (self.pairs.query, self.pairs.target)
            self._cache["components"] = components(self.items.groups(), query, target)
        labels: NDArray[np.int64] = self._cache["components"].copy()
        return labels

    @checked
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
        state, encode = hashlib.sha256(), json.JSONEncoder(sort_keys=True).encode
        for item in self.items:
            state.update(encode(item.to_dict()).encode() + b"\n")
        if self.pairs is not None:
            for name in ("query", "target", "split", "weight"):
                array = getattr(self.pairs, name)
                state.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
        return state.hexdigest()

    def _all_pairs(self, *, every: bool = False) -> Pairs:
        if self.pairs is not None:
            pairs = self.pairs
        else:
            query, target = group_pairs(self.items.groups(), every=every)
            pairs = Pairs(query, target, np.ones(len(query), np.float32), np.full(len(query), UNSPLIT, np.int8))
        if not (pairs.split == UNSPLIT).any():
            return pairs
        if "splits" not in self._cache:
            self._cache["splits"] = split_of_components(self.components(), self.items.text("id"))
        split = np.where(pairs.split == UNSPLIT, self._cache["splits"][pairs.query], pairs.split).astype(np.int8)
        return Pairs(pairs.query, pairs.target, pairs.weight, split)

    def _count(self) -> None:
        """Fill the report's counts: missing fields, splits, leakage."""
        report, n = self.report, len(self.items)
        report.missing = self.items.missing()
        pairs = self._all_pairs()
        report.pairs = len(pairs)
        in_split = np.zeros((len(SPLITS), n), bool)
        for code, name in enumerate(SPLITS):
            chosen = pairs.select(pairs.split == code)
            in_split[code, chosen.query] = in_split[code, chosen.target] = True
            queries = len(np.unique(chosen.query))
            report.splits[name] = {"pairs": len(chosen), "queries": queries, "items": int(in_split[code].sum())}
        items = int((in_split.sum(0) > 1).sum())
        codes = self.items.groups()
        seen = np.zeros((len(SPLITS), int(codes.max(initial=-1)) + 1), bool)
        for code in range(len(SPLITS)):
            seen[code, codes[in_split[code] & (codes >= 0)]] = True
        groups = int((seen.sum(0) > 1).sum())
        report.leakage = {"items_in_several_splits": items, "groups_in_several_splits": groups}
        if items:
            report.warn(f"{items} item(s) occur in pairs of several splits: test figures will be too good")
        if groups:
            report.warn(f"{groups} group(s) have items in several splits: test products are seen in training")
