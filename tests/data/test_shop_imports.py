"""Shops' own exports in their true shapes, with rows that are not as they should be."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_files import bytes_of, picture, run

from tgq_fast.data import Catalog, Item, import_catalog
from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.data.importers.prices import parse_price
from tgq_fast.data.importers.tables import detect, read_table
from tgq_fast.errors import ArgumentError, CatalogError
from tgq_fast.io.files import locked


@pytest.mark.parametrize(
    ("text", "price", "currency"),
    [
        ("1.299,00 €", 1299.0, "EUR"),
        ("€ 1.299", 1299.0, "EUR"),
        ("15.00 USD", 15.0, "USD"),
        ("$1,299.00", 1299.0, "USD"),
        ("1,299", 1299.0, None),
        ("1 299,90 zł", 1299.9, "PLN"),
        ("1\u00a0299,90", 1299.9, None),
        ("CHF 1'299.50", 1299.5, "CHF"),
        ("12,5", 12.5, None),
        ("0.125", 0.125, None),
        ("1.250 KWD", 1.25, "KWD"),
        ("1.234.567", 1234567.0, None),
        ("1234.567", 1234.567, None),
        ("from 12.99 - 15.99 EUR", 12.99, "EUR"),
        ("49", 49.0, None),
        (49, 49.0, None),
        (49.5, 49.5, None),
        ("", None, None),
        (None, None, None),
        (float("nan"), None, None),
        ("on request", None, None),
        ("—", None, None),
    ],
)
def test_prices(text: Any, price: float | None, currency: str | None) -> None:
    assert parse_price(text) == (price, currency)


@pytest.mark.parametrize("bad", ["-5.00", "- 5 €", -1, float("inf"), [1]])
def test_prices_that_are_none(bad: Any) -> None:
    with pytest.raises(ValueError):
        parse_price(bad)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_delimiter_and_encoding_are_told(tmp_path: Path, encoding: str, mark: str) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=mark)
    writer.writerows([["sku", "name", "note"], ["1", "Täßchen, rot; groß", "1,5|2"], ["2", 'B "x"', "a\nb"]])
    path = tmp_path / "t.csv"
    path.write_bytes(buffer.getvalue().encode(encoding))
    with path.open("rb") as file:
        assert detect(file) == (encoding, mark)
    rows, how = read_table(path)
    assert [row for _, row in rows] == [
        {"sku": "1", "name": "Täßchen, rot; groß", "note": "1,5|2"},
        {"sku": "2", "name": 'B "x"', "note": "a\nb"},
    ]
    assert encoding in how


def test_any_table_by_map_and_by_usual_names(tmp_path: Path, images: Path) -> None:
    lines = [
        "SKU;Bezeichnung;Bild;Warengruppe;Preis;Farbe;Link;attributes.fit",
        "007;Täßchen;p1.png|p2.png;Haus > Küche > Tassen;1.299,00 €;rot;https://x/1;weit",
        "8;Krug;P3;Tassen;;;;",
        "9;Glas",
        ";ohne;p4.png;;;;;",
        "8;doppelt;p4.png;;;;;",
        "10;Preis;p4.png;;-1;;;",
        "11;ohne Bild;;;;;;",
        '12;"offen;p5.png;;;;;',
        "13;danach;p6.png;;;blau;;",
    ]
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).encode("cp1252"))
    columns = {"title": "bezeichnung", "file_name": "Bild", "category": "Warengruppe", "price": "Preis"}
    catalog, report = run("table", tmp_path / "t.csv", images=images, columns=columns)
    assert catalog.ids == ["007", "8", "13"] and catalog.items[0].to_dict() == {
        "id": "007", "file_name": "images/007.png", "title": "Täßchen", "category": "Tassen", "price": 1299.0,
        "attributes": {"department": "Haus", "Farbe": "rot", "fit": "weit"},
    }  # fmt: skip
    assert bytes_of(catalog, "8") == picture(3) and catalog.items[2].attributes == {"Farbe": "blau"}
    assert "cp1252 text parted by semicolons" in " ".join(report.notes)
    assert report.skipped == {"broken row": 4, "duplicate id": 1, "no picture": 1}
    with pytest.raises(ArgumentError, match="a column of the table: SKU"):
        run("table", tmp_path / "t.csv", columns={"id": "absent"})
    with pytest.raises(ArgumentError, match=r"attributes\.<name> on the left"):
        run("table", tmp_path / "t.csv", columns={"colour": "Farbe"})
    (tmp_path / "u.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CatalogError, match="--map id="):
        run("table", tmp_path / "u.csv")


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet", ".jsonl"])
def test_tables_of_other_kinds(tmp_path: Path, images: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"Item ID": 1.0, "Name": "A", "Image": "p1.png", "Year": 2012.0, "Brand": 1984},
        {"Item ID": 2.0, "Name": "B", "Image": "p2.png", "Year": None, "Brand": None},
        {"Item ID": None, "Name": "C", "Image": "p3.png", "Year": 2013.0, "Brand": None},
        {"Item ID": 2.0, "Name": "D", "Image": "p3.png", "Year": 2013.0, "Brand": None},
        {"Item ID": 5.0, "Name": "E", "Image": None, "Year": 2013.0, "Brand": None},
    ]
    path = tmp_path / f"t{suffix}"
    if suffix == ".xlsx":
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        book.active.append(list(rows[0]))
        for row in rows:
            book.active.append(list(row.values()))
        book.active.append([None] * 5)
        book.save(path)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    catalog, report = run("table", path, images=images)
    assert catalog.ids == ["1", "2"] and catalog.items[0].attributes == {"Year": "2012"}
    assert (
        catalog.items[0].brand == "1984" and report.skipped["duplicate id"] == 1 and report.skipped["no picture"] == 1
    )
    assert report.skipped["broken row"] == (2 if suffix == ".jsonl" else 1)


def test_excel_files_that_are_none(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    (tmp_path / "t.xlsx").write_bytes(b"PK nonsense")
    with pytest.raises(CatalogError, match="Excel"):
        run("table", tmp_path / "t.xlsx")


def test_parquet_with_pictures_in_it(tmp_path: Path) -> None:
    rows = [{"sku": str(n), "image": {"bytes": picture(n), "path": None}} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    catalog, _ = run("table", tmp_path / "t.parquet")
    assert [bytes_of(catalog, str(n)) for n in range(3)] == [picture(n) for n in range(3)]


def test_a_bare_folder_of_pictures(tmp_path: Path, images: Path) -> None:
    for name, data in (("a/x.png", 1), ("a/b/x.png", 2), ("b/y.PNG", 3), ("b/y.jpg", 4)):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(picture(data))
    (images / "notes.txt").write_text("no picture")
    (images / "dangling.png").symlink_to("absent.png")
    catalog, _ = run("pictures", images)
    assert len(catalog) == 16 and "a/b/x.png" in catalog and "b/y.jpg" in catalog  # two have one stem: suffixes stay
    item = catalog.items[catalog.index("a/b/x.png")]
    assert item.category == "b" and item.attributes == {"department": "a"}
    (tmp_path / "none").mkdir()
    with pytest.raises(CatalogError, match="no pictures"):
        run("pictures", tmp_path / "none")


def save_dataset(folder: Path, rows: list[dict[str, Any]]) -> None:
    """What `Dataset.save_to_disk` of datasets 3 and 4 writes."""
    features = {
        "image": {"_type": "Image"},
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["shoe", "boot"], "_type": "ClassLabel"},
        "colour": {"dtype": "string", "_type": "Value"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("text", pa.string()), ("label", pa.int64()), ("colour", pa.string())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(table, max_chunksize=2)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text("{}")


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": picture(n), "path": f"{n}.png"}, "text": f"T{n}", "label": n % 2, "colour": "red"}
        for n in range(5)
    ]
    rows += [
        {"image": None, "text": "none", "label": 0, "colour": None},
        {"image": {"bytes": None, "path": "absent.png"}, "text": "lost", "label": 0, "colour": None},
        {"image": {"bytes": b"", "path": None}, "text": "empty", "label": 0, "colour": None},
        {"image": {"bytes": picture(7), "path": None}, "text": None, "label": None, "colour": None},
        {"image": {"bytes": picture(8), "path": None}, "text": "odd", "label": 9, "colour": ""},
    ]
    save_dataset(tmp_path / "d", rows)
    catalog, report = run("dataset", tmp_path / "d")
    assert catalog.ids == ["1", "2", "3", "4", "5", "9", "10"]
    assert catalog.items[1].to_dict() == {
        "id": "2", "file_name": "images/2.png", "title": "T1", "category": "boot",
        "attributes": {"colour": "red", "label": "boot"},
    }  # fmt: skip
    assert bytes_of(catalog, "9") == picture(7) and sum(report.skipped.values()) == 3


def test_folders_that_the_installed_datasets_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.ClassLabel(names=["shoe", "boot"])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "label": kinds})
    rows = [{"image": {"bytes": picture(n), "path": None}, "text": f"T{n}", "label": n % 2} for n in range(4)]
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([3])}).save_to_disk(tmp_path / "two")
    for name, number in (("one", 4), ("two", 5)):
        report = import_catalog("dataset", tmp_path / name, tmp_path / f"{name}-shop")
        catalog = Catalog.load(tmp_path / f"{name}-shop")
        assert report.items == len(catalog) == number and not report.skipped
        (found,) = (i for i in catalog.items if i.title == "T2")
        assert found.category == found.attributes["label"] == "shoe" and bytes_of(catalog, found.id) == picture(2)


def test_two_imports_into_one_folder_do_not_mix(tmp_path: Path, images: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".import.lock"), pytest.raises(ArgumentError, match="no other import is writing"):
        import_catalog("pictures", images, tmp_path / "out")
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        results = pool.starmap(_import, [(str(images), str(tmp_path / "out"))] * 3)
    assert sorted(results) == ["imported", "refused", "refused"]
    assert len(Catalog.load(tmp_path / "out")) == 12
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_an_import_that_another_one_overtook_leaves_no_lock(tmp_path: Path, images: Path) -> None:
    late = CatalogWriter("late", tmp_path / "out", limit=None, placement="copy")
    import_catalog("pictures", images, tmp_path / "out")
    with pytest.raises(ArgumentError, match="a folder without a catalogue"), late:
        pass
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def _import(images: str, out: str) -> str:
    try:
        import_catalog("pictures", images, out)
    except ArgumentError:
        return "refused"
    return "imported"


@pytest.mark.parametrize("form", ["rss", "tsv", "shopify"])
def test_the_real_catalogue_exported_and_imported_is_itself(tmp_path: Path, shared_data: Path, form: str) -> None:
    source = Catalog.load(shared_data / "fashion")
    chosen = source.items if form == "shopify" else source.items[:1500]  # the whole of it where most can go wrong
    host = "https://shop.example/media/"
    if form == "shopify":
        path = _as_shopify(tmp_path / "products.csv", chosen, host)
    else:
        path = _as_feed(tmp_path / ("feed.xml" if form == "rss" else "feed.tsv"), chosen, host)
    own = {name: f"{name.title()} (variant.metafields.custom.{name})" for name in ("title", "brand")}
    options = {"columns": own} if form == "shopify" else {}  # Shopify itself has one title and vendor per product
    catalog, report = run(
        "shopify" if form == "shopify" else "merchant", path, images=source.root / "images", **options
    )
    assert not report.skipped and len(catalog) == len(chosen)
    found = {item.id: item for item in catalog.items}
    for item in chosen:
        copy = found[item.id]
        assert copy.attributes == item.attributes, item.id
        assert (copy.title, copy.brand, copy.category, copy.price) == (
            item.title,
            item.brand,
            item.category,
            item.price,
        )
        assert copy.group_id == item.group_id
    for item in chosen[::37]:
        assert bytes_of(catalog, item.id) == source.picture(item).open().read()


def _as_feed(path: Path, items: tuple[Item, ...], host: str) -> Path:
    from xml.sax.saxutils import escape

    if path.suffix == ".tsv":
        names = ["id", "title", "brand", "product_type", "item_group_id", "image_link", "product_detail"]
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(names)
            for item in items:
                inner = io.StringIO()
                csv.writer(inner).writerow([f"All:{n}:{v}" for n, v in item.attributes.items()])
                row = [
                    item.id,
                    item.title,
                    item.brand,
                    item.category,
                    item.group_id,
                    host + Path(item.file_name or "").name,
                ]
                writer.writerow([*row, inner.getvalue().strip()])
        return path
    parts = ['<rss xmlns:g="http://base.google.com/ns/1.0" version="2.0"><channel><title>Fashion</title>']
    for item in items:
        row = {"g:id": item.id, "title": item.title, "g:brand": item.brand, "g:product_type": item.category}
        row |= {"g:item_group_id": item.group_id, "g:image_link": host + Path(item.file_name or "").name}
        parts.append("<item>" + "".join(f"<{n}>{escape(v)}</{n}>" for n, v in row.items() if v is not None))
        for name, value in item.attributes.items():
            inner = f"<g:attribute_name>{escape(name)}</g:attribute_name><g:attribute_value>{escape(value)}"
            parts.append(
                f"<g:product_detail><g:section_name>All</g:section_name>{inner}</g:attribute_value></g:product_detail>"
            )
        parts.append("</item>")
    path.write_text("\n".join([*parts, "</channel></rss>"]))
    return path


def _as_shopify(path: Path, items: tuple[Item, ...], host: str) -> Path:
    names = sorted({name for item in items for name in item.attributes})
    header = ["Handle", "Title", "Vendor", "Type", "Option1 Name", "Option1 Value", "Variant SKU", "Variant Price"]
    header += ["Image Src", "Variant Image", "Title (variant.metafields.custom.title)"]
    header += ["Brand (variant.metafields.custom.brand)"]
    header += [f"{name} (variant.metafields.custom.{name})" for name in names]
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group_id or item.id, []).append(item)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for handle, members in groups.items():
            for number, item in enumerate(members):
                image = host + Path(item.file_name or "").name
                head = [item.title, item.brand, item.category] if number == 0 else ["", "", ""]
                row = [handle, *head, "", "", item.id, "", image, image, item.title, item.brand]
                writer.writerow([*row, *(item.attributes.get(name, "") for name in names)])
    return path


def test_what_is_mistyped_is_refused_before_anything_is_fetched(tmp_path: Path, images: Path) -> None:
    table = tmp_path / "feed.csv"
    table.write_text("id,image\na,https://pictures.invalid/a.png\n")
    with pytest.raises(ArgumentError, match=r"images: got .*nowhere.*a folder of pictures"):
        run("table", table, images=tmp_path / "nowhere")
    with pytest.raises(CatalogError, match="a folder; expected the exported file"):
        run("merchant", images)
    table.write_text("id,image\na,lost.png\n")
    with pytest.raises(CatalogError, match=r"pictures are looked for under .*`images` names another folder"):
        run("table", table)
