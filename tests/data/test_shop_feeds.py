"""Feeds and exports of shop systems: Merchant Center, Shopify, WooCommerce."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from shop_files import bytes_of, picture, run

from tgq_fast.data import import_catalog
from tgq_fast.errors import CatalogError

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
