"""Shops' own exports in their true shapes, with rows that are not as they should be."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tgq_fast.data import Catalog, ImportReport, Item, import_catalog
from tgq_fast.data.files import locked
from tgq_fast.data.importers import ShopOptions
from tgq_fast.data.importers.prices import parse_price
from tgq_fast.data.importers.tables import detect, read_table
from tgq_fast.errors import ArgumentError, CatalogError


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (number * 37 % 256, number * 91 % 256, number * 17 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        (folder / f"p{number}.png").write_bytes(picture(number))
    return folder


def run(source: str, path: Path, **options: Any) -> tuple[Catalog, ImportReport]:
    out = path.parent / f"out-{source}-{time.monotonic_ns()}"
    report = import_catalog(source, path, out, options=ShopOptions(download=False, **options))
    catalog = Catalog.load(out)
    assert catalog.report.ok and len(catalog) == report.items
    return catalog, report


def bytes_of(catalog: Catalog, item_id: str) -> bytes:
    return catalog.picture(catalog.items[catalog.index(item_id)]).open().read()


# ---------------------------------------------------------------- prices, delimiters, encodings


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


# ---------------------------------------------------------------- Google Merchant

RSS = """<?xml version="1.0"?>
<rss xmlns:g="http://base.google.com/ns/1.0" version="2.0"><channel>
<title>Shop</title><link>https://shop.example</link><description>d</description>
<item><g:id>A1</g:id><title>Red &amp; white mug</title><g:image_link>https://shop.example/i/p1.png?v=2</g:image_link>
  <g:additional_image_link>https://shop.example/i/p2.png</g:additional_image_link>
  <g:additional_image_link>https://shop.example/i/p3.png</g:additional_image_link>
  <g:price>15.00 USD</g:price><g:brand>Mugs</g:brand><g:item_group_id>M</g:item_group_id><g:color>red</g:color>
  <g:product_type>Home &gt; Kitchen &gt; Mugs</g:product_type><g:shipping><g:country>US</g:country></g:shipping>
  <g:product_detail><g:section_name>General</g:section_name><g:attribute_name>Glaze</g:attribute_name>
    <g:attribute_value>matt</g:attribute_value></g:product_detail></item>
<item><g:id>A2</g:id><g:title><![CDATA[Blue <b>mug</b>]]></g:title><g:image_link>/x/P2.PNG</g:image_link>
  <g:price>1.015,50 EUR</g:price><g:item_group_id>M</g:item_group_id><g:availability>in_stock</g:availability></item>
<item><g:id>A1</g:id><title>again</title><g:image_link>p3.png</g:image_link></item>
<item><title>no id</title><g:image_link>p3.png</g:image_link></item>
<item><g:id>A3</g:id><title>no picture</title></item>
<item><g:id>A4</g:id><title>lost</title><g:image_link>https://shop.example/i/absent.png</g:image_link></item>
<item><g:id>A5</g:id><title>debt</title><g:image_link>p4.png</g:image_link><g:price>-3 USD</g:price></item>
<item><g:id>A6</g:id><title>plain</title><g:image_link>p5.png</g:image_link><g:product_type>Mugs</g:product_type></item>
</channel></rss>"""


def test_a_merchant_feed_in_rss(tmp_path: Path, images: Path) -> None:
    (tmp_path / "feed.xml").write_text(RSS)
    catalog, report = run("merchant", tmp_path / "feed.xml", images=images)
    assert catalog.ids == ["A1", "A2", "A6"]
    assert catalog.items[0].to_dict() == {
        "id": "A1",
        "file_name": "images/A1.png",
        "title": "Red & white mug",
        "brand": "Mugs",
        "category": "Mugs",
        "attributes": {"color": "red", "department": "Home", "Glaze": "matt"},
        "price": 15.0,
        "group_id": "M",
    }
    assert catalog.items[1].title == "Blue <b>mug</b>" and catalog.items[1].price == 1015.5
    assert bytes_of(catalog, "A1") == picture(1) and bytes_of(catalog, "A2") == picture(2)
    reasons = {"duplicate id": 1, "broken row": 2, "no picture": 1, "picture not fetched": 1}
    assert report.skipped == reasons and "2 further picture(s)" in " ".join(report.notes)
    assert any("several currencies" in note for note in report.notes)
    everything, _ = run("merchant", tmp_path / "feed.xml", images=images, pictures="all")
    assert [(i.id, i.group_id) for i in everything.items][:4] == [
        ("A1", "M"),
        ("A1-2", "M"),
        ("A1-3", "M"),
        ("A2", "M"),
    ]


def test_a_merchant_feed_in_atom_and_in_text(tmp_path: Path, images: Path) -> None:
    (tmp_path / "atom.xml").write_text(
        '<feed xmlns="http://www.w3.org/2005/Atom" xmlns:g="http://base.google.com/ns/1.0"><title>t</title>'
        "<entry><g:id>A1</g:id><title>Mug</title><g:image_link>p1.png</g:image_link><g:gender>unisex</g:gender></entry>"
        "</feed>"
    )
    catalog, _ = run("merchant", tmp_path / "atom.xml", images=images)
    assert catalog.items[0].title == "Mug" and catalog.items[0].attributes == {"gender": "unisex"}
    rows = [
        [
            "id",
            "title",
            "image link",
            "additional image link",
            "product type",
            "item group ID",
            "product_detail",
            "Price",
        ],
        [
            "A1",
            "Mug",
            "p1.png",
            "p2.png,p3.png",
            "Home > Mugs, Gifts",
            "M",
            'General:Glaze:matt,"Size:w,d:1, 2"',
            "5 EUR",
        ],
        ["A2", 'A 5" bowl', "p2.png", "", "", "", "broken detail", ""],
        ["A3", "too few"],
        ["A4", "no picture", "", "", "", "", "", ""],
        ["A1", "again", "p3.png", "", "", "", "", ""],
        ["", "no id", "p3.png", "", "", "", "", ""],
    ]
    with (tmp_path / "feed.txt").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    catalog, report = run("merchant", tmp_path / "feed.txt", images=images)
    assert catalog.ids == ["A1", "A2"] and catalog.items[1].title == 'A 5" bowl'
    assert catalog.items[0].attributes == {"department": "Home", "Glaze": "matt", "w,d": "1, 2"}
    assert catalog.items[0].group_id == "M" and catalog.items[0].price == 5 and catalog.items[0].category == "Mugs"
    assert report.skipped == {"broken row": 2, "no picture": 1, "duplicate id": 1}


def test_feeds_that_are_none(tmp_path: Path, images: Path) -> None:
    cut = RSS[: RSS.index("<item><g:id>A3")]
    (tmp_path / "cut.xml").write_text(cut + "<item><g:id>A9")
    catalog, report = run("merchant", tmp_path / "cut.xml", images=images)
    assert catalog.ids == ["A1", "A2"] and report.skipped["the feed breaks off"] == 1
    bomb = '<!DOCTYPE r [<!ENTITY a "aaaa">]><rss><channel><item><id>&a;</id></item></channel></rss>'
    for name, text in (("bomb", bomb), ("html", "<html><body>404</body></html>"), ("none", "nothing"), ("empty", "")):
        (tmp_path / f"{name}.xml").write_text(text)
        with pytest.raises(CatalogError):
            import_catalog("merchant", tmp_path / f"{name}.xml", tmp_path / f"out-{name}")
        assert not (tmp_path / f"out-{name}" / "metadata.jsonl").exists()


# ---------------------------------------------------------------- Shopify

SHOPIFY = [
    "Handle", "Title", "Body (HTML)", "Vendor", "Product Category", "Type", "Tags", "Published", "Option1 Name",
    "Option1 Value", "Option2 Name", "Option2 Value", "Variant SKU", "Variant Price", "Image Src", "Image Position",
    "Variant Image", "Fabric (product.metafields.custom.fabric)", "Status",
]  # fmt: skip


def shopify(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, SHOPIFY)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_shopify_export(tmp_path: Path, images: Path) -> None:
    url = "https://cdn.shopify.com/s/files/p{}.png?v=17"
    rows = [
        {"Handle": "tee", "Title": "Tee", "Body (HTML)": "<p>One,\ntwo</p>", "Vendor": "V", "Type": "Shirts",
         "Product Category": "Apparel > Tops > Tees", "Option1 Name": "Color", "Option1 Value": "Red",
         "Option2 Name": "Size", "Option2 Value": "S", "Variant SKU": "T-R-S", "Variant Price": "19.00",
         "Image Src": url.format(1), "Image Position": "1", "Variant Image": url.format(1),
         "Fabric (product.metafields.custom.fabric)": "cotton", "Status": "active"},
        {"Handle": "tee", "Option1 Value": "Red", "Option2 Value": "M", "Variant SKU": "T-R-M",
         "Variant Price": "19.00", "Image Src": url.format(2), "Image Position": "2", "Variant Image": url.format(1)},
        {"Handle": "tee", "Option1 Value": "Blue", "Option2 Value": "S", "Variant Price": "21.00",
         "Variant Image": url.format(2)},
        {"Handle": "tee", "Image Src": url.format(3), "Image Position": "3"},
        {"Handle": "mug", "Title": "Mug", "Vendor": "V", "Option1 Name": "Title", "Option1 Value": "Default Title",
         "Variant Price": "9.50", "Image Src": url.format(4)},
        {"Handle": "mug", "Image Src": url.format(5)},
        {"Handle": "", "Title": "nobody"},
        {"Handle": "bare", "Title": "No picture", "Variant SKU": "B", "Variant Price": "1"},
        {"Handle": "debt", "Title": "Debt", "Variant SKU": "D", "Variant Price": "-1", "Image Src": url.format(6)},
        {"Handle": "far", "Title": "Far", "Variant SKU": "F", "Image Src": "https://cdn/absent.png"},
        {"Handle": "dup", "Title": "Dup", "Variant SKU": "T-R-S", "Image Src": url.format(7)},
    ]  # fmt: skip
    path = shopify(tmp_path / "products_export.csv", rows)
    with path.open("a") as file:
        file.write("too,few\n")
    catalog, report = run("shopify", path, images=images)
    assert catalog.ids == ["T-R-S", "tee-blue-s", "mug"]
    red, blue, mug = catalog.items
    assert (red.group_id, blue.group_id, mug.group_id) == ("tee", "tee", None)
    assert red.attributes == {
        "color": "Red",
        "size": "S",
        "fabric": "cotton",
        "department": "Apparel",
        "status": "active",
    }
    assert blue.attributes["color"] == "Blue" and blue.title == "Tee" and blue.category == "Shirts" and blue.price == 21
    assert [bytes_of(catalog, item.id) for item in catalog.items] == [picture(1), picture(2), picture(4)]
    assert mug.attributes == {} and mug.price == 9.5
    assert report.skipped == {
        "no Handle": 1, "no picture": 1, "broken row": 2, "picture not fetched": 1, "duplicate id": 1,
    }  # fmt: skip
    assert any("1 variant(s) share a picture" in note for note in report.notes)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CatalogError, match="no Handle"):
        import_catalog("shopify", tmp_path / "other.csv", tmp_path / "o")


# ---------------------------------------------------------------- WooCommerce


def test_a_woocommerce_export(tmp_path: Path, images: Path) -> None:
    header = ["ID", "Type", "SKU", "Name", "Published", "Sale price", "Regular price", "Categories", "Tags", "Images",
              "Parent", "Attribute 1 name", "Attribute 1 value(s)", "Brands"]  # fmt: skip
    rows = [
        [1, "variable", "HOOD", "Hoodie", 1, "", "", "Clothing, Clothing > Hoodies", "warm",
         "http://w/p1.png, http://w/p2.png", "", "Color", "Red, Blue", "Woo"],
        [2, "variation", "HOOD-R", "Hoodie - Red", 1, "39,00", "45,00", "", "", "http://w/p3.png", "HOOD", "Color",
         "Red", ""],
        [3, "variation", "HOOD-B", "Hoodie - Blue", 1, "", "45,00", "", "", "", "id:1", "Color", "Blue", ""],
        [4, "simple, downloadable, virtual", "", "Album", 1, "", "15", "Music", "", "http://w/p4.png", "", "", "", ""],
        [5, "grouped", "SET", "Set", 1, "", "", "", "", "http://w/p5.png", "", "", "", ""],
        [6, "variation", "LOST", "Lost", 1, "", "5", "", "", "http://w/p5.png", "NOBODY", "", "", ""],
        [7, "simple", "BARE", "Bare", 1, "", "5", "", "", "", "", "", "", ""],
        [8, "simple", "HOOD-R", "Twice", 1, "", "5", "", "", "http://w/p5.png", "", "", "", ""],
        [9, "simple", "DEBT", "Debt", 1, "", "-5", "", "", "http://w/p5.png", "", "", "", ""],
        [10, "variable", "ALONE", "No variations", 1, "", "5", "A\\, B > C", "", "http://w/p6.png", "", "", "", ""],
    ]  # fmt: skip
    with (tmp_path / "wc.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])
    catalog, report = run("woocommerce", tmp_path / "wc.csv", images=images)
    assert catalog.ids == ["HOOD-R", "HOOD-B", "4", "ALONE"]
    red, blue, album, alone = catalog.items
    assert (red.group_id, blue.group_id, album.group_id) == ("HOOD", "HOOD", None)
    assert (red.price, blue.price, album.price) == (39, 45, 15) and red.brand == "Woo" and blue.category == "Hoodies"
    assert red.attributes == {"department": "Clothing", "color": "Red", "tags": "warm"}
    assert alone.category == "C" and alone.attributes == {"department": "A, B"}
    assert [bytes_of(catalog, i.id) for i in catalog.items] == [picture(3), picture(1), picture(4), picture(6)]
    assert report.skipped == {
        "a grouped product is no item of its own": 1, "its parent is not in the export": 1, "no picture": 1,
        "duplicate id": 1, "broken row": 1,
    }  # fmt: skip


# ---------------------------------------------------------------- tables, folders, datasets


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


# ---------------------------------------------------------------- one folder, one import


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


def _import(images: str, out: str) -> str:
    try:
        import_catalog("pictures", images, out)
    except ArgumentError:
        return "refused"
    return "imported"


# ---------------------------------------------------------------- a real catalogue there and back


@pytest.mark.parametrize("form", ["rss", "tsv", "shopify"])
def test_the_real_catalogue_exported_and_imported_is_itself(tmp_path: Path, shared_data: Path, form: str) -> None:
    source = Catalog.load(shared_data / "fashion")
    chosen = source.items[:1500]
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
