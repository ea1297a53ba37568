"""Data sets in shards: Parquet with pictures in it, WebDataset tar files; read one after another, never whole."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.data.importers.folders import product_of_row
from tgq_fast.data.importers.shop import Product, ShopOptions, write_products
from tgq_fast.data.loading import embedded_pictures
from tgq_fast.data.parquet_rows import EmbeddedPicture
from tgq_fast.data.rows import read_rows, suffix_of
from tgq_fast.data.tar_rows import Member, pictures_of, sample_row, tar_groups
from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError
from tgq_fast.io.places import Place, open_place, place

__all__ = ["import_parquet", "import_webdataset"]

_PACKED = (".tar.gz", ".tgz")
_DAMAGED = (tarfile.TarError, zlib.error, EOFError, OSError, UnicodeError, ValueError)
_MOST = 128 << 20  # bytes of one member


def import_parquet(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import one Parquet file or all below a folder, with columns as `datasets` and the hub name them.

    Raises:
        CatalogError: there is none, or none can be read.
    """
    parts = _parts(path, (".parquet",))
    pictures = embedded_pictures(parts)

    def products() -> Iterator[Product]:
        for number, row in read_rows(parts):
            if isinstance(row, RowError):
                writer.skip(number, "broken row", str(row))
                continue
            for name, value in row.items():
                if isinstance(value, EmbeddedPicture) and pictures is not None:
                    try:
                        row[name] = pictures.read(value.address)
                    except OSError as error:
                        writer.skip(number, "picture missing", str(error))
                        row[name] = None
            yield product_of_row(number, row, {}, options)

    write_products(products(), writer, options, path)


def import_webdataset(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import one tar file (.tar, .tar.gz) or all below a folder.

    Raises:
        CatalogError: there is none.
    """
    parts = _parts(path, (".tar", *_PACKED))

    def products() -> Iterator[Product]:
        number = 0
        for name, part in parts.items():
            for row in _samples(part, name):
                number += 1
                if isinstance(row, RowError):
                    writer.skip(number, "broken row", str(row))
                else:
                    yield product_of_row(number, row, {}, options)

    write_products(products(), writer, options, path)


def _samples(part: Place, name: str) -> Iterator[dict[str, Any] | RowError]:
    """Rows of one tar file, packed or not, from front to back."""
    held: dict[str, bytes] = {}
    try:
        with open_place(part) as raw, tarfile.open(fileobj=raw, mode="r|*") as archive:

            def members() -> Iterator[Member]:
                for found in archive:
                    vars(archive)["members"].clear()
                    file = archive.extractfile(found) if found.isreg() and found.size <= _MOST else None
                    if file is not None:
                        held[found.name] = file.read()
                        yield Member(found.name, found.offset_data, found.size)

            for sample in tar_groups(members()):
                data = {member.name: held.pop(member.name) for member in sample}
                yield sample_row(sample, lambda m, data=data: data[m.name], [data[m.name] for m in pictures_of(sample)])
    except _DAMAGED as error:
        yield RowError([f"{name} is damaged or cannot be read; what follows in it is lost: {str(error)[:200]}"])


def _parts(path: Path, suffixes: tuple[str, ...]) -> dict[str, Place]:
    there = place(path)
    try:
        if not there.is_dir():
            return {there.name: there}
        found = sorted(below for below in _walk(there) if suffix_of(below) in suffixes)
    except OSError as error:
        raise CatalogError(there, [f"cannot be read: {error}"]) from error
    if not found:
        raise CatalogError(there, [f"no {', '.join(suffixes)} in the folder or below it"])
    return {str(part)[len(str(there)) :].strip("/"): part for part in found}


def _walk(folder: Place) -> Iterator[Place]:
    for entry in folder.iterdir():
        if entry.name.startswith((".", "_")):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry
