"""What the importers of shops' exports share: products with pictures by path or address, written in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from tgq_fast.data.columns import PICTURE_SUFFIXES, canonical_name
from tgq_fast.data.importers.common import CatalogWriter, image_index
from tgq_fast.data.importers.download import Downloader, DownloadLimits
from tgq_fast.data.importers.prices import parse_price
from tgq_fast.data.values import RowError, plain_value, scalar_text
from tgq_fast.io.files import open_regular

__all__ = ["Product", "ShopOptions", "category_of", "mapped", "text_of", "write_products"]

_BATCH = 256
LONG = 500
TARGETS = ("id", "file_name", "title", "brand", "category", "price", "group_id")


@dataclass(frozen=True)
class ShopOptions:
    """How a shop's export is read.

    Attributes:
        columns: the catalogue's name → the export's column, going before what is recognised; "attributes.<name>" too.
        images: folder whose pictures are taken by file name instead of being fetched.
        download: fetch pictures by web address.
        pictures: "first" gives an item its first picture; "all" makes an item of every further one, in its group.
        delimiter, encoding: of text tables; None: told from the file.
        limits: of downloads.
        on_progress: called with the number of products done.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    images: Path | None = None
    download: bool = True
    pictures: Literal["first", "all"] = "first"
    delimiter: str | None = None
    encoding: str | None = None
    limits: DownloadLimits = field(default_factory=DownloadLimits)
    on_progress: Callable[[int], None] | None = None


@dataclass
class Product:
    """One item of an export: its row, its columns (price and category as written) and where its pictures lie."""

    row: int
    columns: dict[str, Any]
    pictures: list[Any] = field(default_factory=list)


def text_of(value: object) -> str | None:
    """A cell as text; None for a gap, blank text, or what has no text."""
    try:
        text = scalar_text(plain_value(value))
    except RowError:
        return None
    return text.strip() or None if text is not None else None


def category_of(value: object, *, parts: str = ">") -> tuple[str | None, str | None]:
    """Last and first name of a path "A > B > C"; the first is None where there is only one."""
    text = text_of(value)
    names = [name.strip() for name in (text or "").split(parts) if name.strip()]
    if not names:
        return None, None
    return names[-1], names[0] if len(names) > 1 else None


def mapped(raw: Mapping[Any, Any], options: ShopOptions) -> dict[str, Any]:
    """What `options.columns` names: target → value of the row's column, whatever its case."""
    if not options.columns:
        return {}
    exact = {str(name): value for name, value in raw.items()}
    folded = {canonical_name(name): value for name, value in raw.items()}
    return {
        target: exact[column] if column in exact else folded.get(canonical_name(column))
        for target, column in options.columns.items()
    }


def write_products(products: Iterable[Product], writer: CatalogWriter, options: ShopOptions, root: Path) -> None:
    """Place the pictures of products and write them; what fails is listed in the report.

    Args:
        products: in the order of the export.
        writer: of the catalogue.
        options: see there.
        root: folder that relative paths of pictures refer to.
    """
    index = _Index(options.images)
    loader = Downloader(writer.out / ".downloads", options.limits)
    currencies: Counter[str] = Counter()
    unused = done = 0
    stream = iter(products)
    while batch := list(islice(stream, _BATCH)):
        wanted = [[_source(picture, root, index) for picture in product.pictures] for product in batch]
        if options.pictures == "first":
            unused += sum(max(0, len(sources) - 1) for sources in wanted)
            wanted = [sources[:1] for sources in wanted]
        addresses = [s for sources in wanted for s in sources if isinstance(s, str)]
        fetched = (
            loader.fetch_all(addresses) if options.download else dict.fromkeys(addresses, "not fetched (by choice)")
        )
        for product, sources in zip(batch, wanted, strict=True):
            done += 1
            try:
                price, currency = parse_price(product.columns.get("price"))
            except RowError as error:
                writer.skip(product.row, "broken row", str(error))
                continue
            currencies.update([currency] if currency else [])
            columns = {**product.columns, "price": price}
            files = [fetched[s] if isinstance(s, str) else s for s in sources]
            _write(product.row, columns, files, writer)
        if options.on_progress is not None:
            options.on_progress(done)
    notes = writer.report.notes
    if loader.fetched or loader.reused:
        notes.append(f"{loader.fetched} picture(s) fetched, {loader.reused} were there from an earlier run")
    if unused:
        notes.append(f"{unused} further picture(s) are not used; pictures='all' makes items of them in the same group")
    if len(currencies) > 1:
        notes.append("prices are in several currencies and not converted: " + ", ".join(sorted(currencies)))


def _write(row: int, columns: dict[str, Any], files: list[Path | str | bytes], writer: CatalogWriter) -> None:
    usable = [file for file in files if not isinstance(file, str)]
    for reason in (file for file in files if isinstance(file, str)):
        writer.skip(row, "picture not fetched", reason)
    if not usable:
        if not files:
            writer.skip(row, "no picture", str(columns.get("id")))
        return
    written = writer.add(row, columns, usable[0])
    for number, file in enumerate(usable[1:] if written else (), 2):
        writer.add(
            row, {**columns, "id": f"{columns['id']}-{number}", "group_id": columns["group_id"] or columns["id"]}, file
        )


class _Index:
    """Pictures of a folder by file name, else by stem, whatever the case."""

    def __init__(self, folder: Path | None) -> None:
        self.files: dict[str, Path] = {}
        for stem, path in (image_index(folder) if folder is not None else {}).items():
            self.files.setdefault(stem.casefold(), path)
            self.files[path.name.casefold()] = path

    def find(self, reference: str) -> Path | None:
        name = PurePosixPath(unquote(urlsplit(reference).path if "://" in reference else reference).replace("\\", "/"))
        return self.files.get(name.name.casefold()) or self.files.get(name.stem.casefold())


def _source(picture: Any, root: Path, index: _Index) -> Path | str | bytes:
    """Bytes, a file, or the web address to fetch."""
    if isinstance(picture, bytes):
        return picture
    reference = str(picture).strip()
    found = index.find(reference)
    if found is not None:
        return found
    if reference.startswith("//"):
        return "https:" + reference
    if "://" in reference:
        if reference.startswith("file://"):
            return Path(unquote(urlsplit(reference).path))
        return reference
    return root / reference


def readable(path: Path) -> bool:
    """Whether a path is a plain file that can be opened."""
    try:
        open_regular(path).close()
    except OSError:
        return False
    return True


def folder_pictures(folder: Path) -> Iterator[Path]:
    """Pictures of a folder and its subfolders, by name."""
    yield from sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and readable(p))
