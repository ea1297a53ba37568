"""Importers on small fixtures written in each data set's true form."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tgq_fast.data import Catalog, import_catalog, load_image
from tgq_fast.data.importers import PUBLIC
from tgq_fast.data.importers.abo import pick_value
from tgq_fast.data.importers.fashion import COLUMNS
from tgq_fast.errors import ArgumentError, CatalogError


def picture(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), color).save(path, "JPEG")


# ---- GroceryStoreDataset

HEADER = (
    "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),"
    "Iconic Image Path (str),Product Description Path (str)"
)
CLASSES = """Golden-Delicious,0,Apple,0,/iconic-images-and-descriptions/Fruit/Apple_Iconic.jpg,/x_Description.txt
Oatly-Oat-Milk,45,Oat-Milk,22,/iconic-images-and-descriptions/Packages/Oatly-Oat-Milk_Iconic.jpg,/y_Description.txt
"""


@pytest.fixture
def grocery(tmp_path: Path) -> Path:
    root = tmp_path / "GroceryStoreDataset"
    data = root / "dataset"
    data.mkdir(parents=True)
    (data / "classes.csv").write_text(HEADER + "\n" + CLASSES)
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        lines = []
        for i in range(1, count + 1):
            for name, folder, fine, coarse in (
                ("Golden-Delicious", "Fruit/Apple/Golden-Delicious", 0, 0),
                ("Oatly-Oat-Milk", "Packages/Oat-Milk/Oatly-Oat-Milk", 45, 22),
            ):
                file = f"{split}/{folder}/{name}_{i:03d}.jpg"
                lines.append(f"{file}, {fine}, {coarse}")
                picture(data / file)
        if split == "test":
            lines += [
                "test/Fruit/Apple/Golden-Delicious/absent.jpg, 0, 0",
                "nonsense",
                "../../x/y.jpg, 0, 0",
                "test/a/b.jpg, 99, 1",
            ]
        (data / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_grocery(grocery: Path, tmp_path: Path) -> None:
    report = import_catalog("grocery", grocery, tmp_path / "out")
    assert (report.items, report.groups) == (12, 2)
    assert report.skipped == {"picture missing": 1, "broken line": 2, "path leaves the data set": 1}
    catalog = Catalog.load(tmp_path / "out")
    assert catalog.report.ok
    item = catalog.items[catalog.index("train-Oatly-Oat-Milk_001")]
    assert (item.title, item.category, item.brand) == ("Oatly Oat Milk", "Oat Milk", None)
    assert item.attributes == {"department": "Packages"} and item.group_id == "product-45"
    load_image(catalog.image_path(item), item.id)
    # ordered pairs within a list and a product: 2 products × (3·2 train + 0 validation + 2·1 test)
    assert [len(catalog.split_pairs(s)) for s in ("train", "validation", "test")] == [12, 0, 4]
    assert catalog.report.leakage["items_in_several_splits"] == 0
    assert import_catalog("grocery", grocery / "dataset", tmp_path / "out2").items == 12


# ---- Kaggle fashion-product-images

STYLES = [
    "15970,Men,Apparel,Topwear,Shirts,Navy Blue,Fall,2011,Casual,Turtle Check Men Navy Blue Shirt",
    "15971,Men,Apparel,Topwear,Shirts,Red,Fall,2011,Casual,Turtle Check Men Red Shirt",
    "59263,Women,Accessories,Watches,Watches,Silver,Winter,2016.0,NA,Titan Women Silver Watch",
    # unquoted commas, as in the rows that pandas calls bad lines
    "6044,Women,Footwear,Shoes,Casual Shoes,White,Summer,2012,Casual,Newfeel Unisex White, Blue and Orange Shoes",
    '7000,Men,Apparel,Topwear,Tshirts,Blue,,,Casual,"Nike Men ""Just, do it"" Blue T-shirt"',
    '7001,Men,Apparel,Topwear,Tshirts,Blue,Fall,2012,Casual,Nike Men 5" stray quote',
    "1164,Men,Apparel",
    "abc,Men,Apparel,Topwear,Tshirts,Blue,Fall,2012,Casual,No number",
    "39401,Men,Apparel,Bottomwear,Jeans,Blue,Fall,2012,Casual,No picture of this one",
    "",
]


@pytest.fixture(params=["small", "full"])
def fashion(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = tmp_path / "fashion-product-images"
    tail = ",," if request.param == "full" else ""  # some copies carry trailing commas
    (root / "images").mkdir(parents=True)
    (root / "styles.csv").write_text("\n".join([",".join(COLUMNS) + tail, *STYLES]), encoding="utf-8")
    for number in (15970, 15971, 59263, 6044, 7000, 7001):
        picture(root / "images" / f"{number}.jpg")
    if request.param == "full":
        (root / "styles").mkdir()
        (root / "styles" / "59263.json").write_text(
            json.dumps(
                {
                    "notification": {},
                    "meta": {"code": 200},
                    "data": {"id": 59263, "price": 5195, "brandName": "Titan Raga"},
                }
            )
        )
        (root / "styles" / "6044.json").write_text("{broken")
    return root


def test_fashion(fashion: Path, tmp_path: Path) -> None:
    report = import_catalog("fashion", fashion, tmp_path / "out")
    assert report.items == 6 and report.groups == 1
    assert report.skipped == {"too few fields": 1, "id is not a number": 1, "picture missing": 1}
    catalog = Catalog.load(tmp_path / "out")
    items = {item.id: item for item in catalog.items}
    assert items["fp-6044"].title == "Newfeel Unisex White, Blue and Orange Shoes"
    assert items["fp-7000"].title == 'Nike Men "Just, do it" Blue T-shirt'
    assert items["fp-7001"].title == 'Nike Men 5" stray quote'
    shirt = items["fp-15970"]
    assert (
        shirt.brand == "Turtle Check" and shirt.category == "Shirts" and shirt.attributes["baseColour"] == "Navy Blue"
    )
    assert shirt.group_id == items["fp-15971"].group_id is not None
    watch = items["fp-59263"]
    assert watch.attributes["year"] == "2016" and "usage" not in watch.attributes and watch.group_id is None
    full = (fashion / "styles").exists()
    assert (watch.brand, watch.price) == (("Titan Raga", 5195.0) if full else ("Titan", None))
    assert "season" not in items["fp-7000"].attributes
    assert sum(len(catalog.split_pairs(s)) for s in ("train", "validation", "test")) == 2


def test_fashion_generic_names_are_not_groups(tmp_path: Path) -> None:
    root = tmp_path / "f"
    rows = [f"{i},Men,Apparel,Topwear,Tshirts,Red,Fall,2011,Casual,Puma Men T-shirt" for i in range(30)]
    (root / "images").mkdir(parents=True)
    (root / "styles.csv").write_text("\n".join([",".join(COLUMNS), *rows]))
    for i in range(30):
        picture(root / "images" / f"{i}.jpg")
    report = import_catalog("fashion", root, tmp_path / "out")
    assert report.items == 30 and report.groups == 0 and any("not grouped" in note for note in report.notes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from('0123456789,"\n\r aMé\x00'), max_size=300))
def test_fashion_survives_any_table(tmp_path: Path, text: str) -> None:
    root = tmp_path / "f"
    (root / "images").mkdir(parents=True, exist_ok=True)
    picture(root / "images" / "1.jpg")
    rows = [",".join(COLUMNS), "1,Men,Apparel,Topwear,Shirts,Red,Fall,2011,Casual,Good Men Shirt", text]
    (root / "styles.csv").write_text("\n".join(rows), encoding="utf-8")
    out = tmp_path / "out"
    for old in ("metadata.jsonl", "pairs.jsonl"):
        (out / old).unlink(missing_ok=True)
    assert import_catalog("fashion", root, out).items == 1


# ---- Amazon Reviews 2023


def amazon_row(asin: str, **changes: Any) -> dict[str, Any]:
    base = f"https://m.media-amazon.com/images/I/{asin}pic"
    return {
        "main_category": "All Beauty",
        "title": f"Product {asin}",
        "average_rating": 4.8,
        "rating_number": 10,
        "features": [],
        "description": [],
        "price": None,
        "images": [
            {"thumb": f"{base}2._SS40_.jpg", "large": f"{base}2._AC_.jpg", "variant": "PT01", "hi_res": None},
            {
                "thumb": f"{base}._SS40_.jpg",
                "large": f"{base}._AC_.jpg",
                "variant": "MAIN",
                "hi_res": f"{base}._AC_SL1500_.jpg",
            },
        ],
        "videos": [],
        "store": "Howard Products",
        "categories": [],
        "details": {"Package Dimensions": "7 x 5 x 3 inches", "UPC": "617390882781"},
        "parent_asin": asin,
        "bought_together": None,
        **changes,
    }


@pytest.fixture(params=["meta_All_Beauty.jsonl", "meta_All_Beauty.jsonl.gz"])
def amazon(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = tmp_path / "amazon"
    root.mkdir()
    columns = {
        "hi_res": [None],
        "large": ["https://m.media-amazon.com/images/I/71x%2By.jpg"],
        "thumb": ["t"],
        "variant": ["MAIN"],
    }
    rows = [
        amazon_row(
            "B01",
            price=14.98,
            categories=["Beauty", "Hair Care", "Combs"],
            details={"Brand": "Goody", "Material": "Wood", "Color": "Red"},
        ),
        amazon_row("B02", price="from $1,012.50", details=json.dumps({"Color": "Blue", "Best Sellers Rank": {"x": 1}})),
        amazon_row("B03", images=columns, price="—"),
        amazon_row("B04"),  # its picture was not downloaded
        amazon_row("B01"),  # a repeated row
        amazon_row("B06", title=None, store=None, details=None, images=None, main_category=None),
        "{broken",
        amazon_row("", images=[]),
    ]
    data = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows).encode()
    (root / request.param).write_bytes(gzip.compress(data) if request.param.endswith("gz") else data)
    picture(root / "images" / "B01.jpg")
    picture(root / "images" / "B02pic._AC_SL1500_.jpg")
    picture(root / "images" / "71x+y.jpg")
    picture(root / "images" / "deep" / "B06.jpg")
    return root


def test_amazon2023(amazon: Path, tmp_path: Path) -> None:
    report = import_catalog("amazon2023", amazon, tmp_path / "out")
    assert report.items == 4 and report.pairs == 0
    assert report.skipped == {"picture not downloaded": 1, "duplicate id": 1, "broken row": 1, "no parent_asin": 1}
    assert any("pairs.jsonl" in note for note in report.notes)
    items = {item.id: item for item in Catalog.load(tmp_path / "out").items}
    first = items["B01"]
    assert (first.title, first.brand, first.category, first.price) == ("Product B01", "Goody", "Combs", 14.98)
    assert first.attributes == {"color": "Red", "material": "Wood", "main_category": "All Beauty"}
    second = items["B02"]
    assert (second.brand, second.category, second.price) == ("Howard Products", "All Beauty", 1012.5)
    assert second.attributes == {"color": "Blue"} and items["B03"].price is None
    assert (items["B06"].title, items["B06"].brand, items["B06"].category) == (None, None, None)
    one_file = next(amazon.glob("meta_*"))
    assert import_catalog("amazon2023", one_file, tmp_path / "out2", limit=2, copy="copy").items == 2


def test_amazon2023_damaged_gzip_keeps_what_came_before(tmp_path: Path) -> None:
    amazon = tmp_path / "amazon"
    file = amazon / "meta_All_Beauty.jsonl.gz"
    picture(amazon / "images" / "B01.jpg")
    lines = [json.dumps(amazon_row(f"B{i:05d}", description=[os.urandom(40).hex()])) for i in range(3000)]
    data = gzip.compress("\n".join([json.dumps(amazon_row("B01")), *lines]).encode())
    file.write_bytes(data[: len(data) // 2])
    report = import_catalog("amazon2023", amazon, tmp_path / "out")
    assert report.items == 1 and report.skipped["broken row"] == 1


# ---- Amazon Berkeley Objects


def abo_row(item_id: str, image: str | None, **changes: Any) -> dict[str, Any]:
    row = {
        "brand": [{"language_tag": "nl_NL", "value": "Rivet (NL)"}, {"language_tag": "en_GB", "value": "Rivet"}],
        "bullet_point": [{"language_tag": "en_US", "value": "Printed on wood"}],
        "color": [{"language_tag": "en_US", "standardized_values": ["Multi"], "value": "Multicolor"}],
        "item_id": item_id,
        "item_name": [
            {"language_tag": "zh_CN", "value": "椅子"},
            {"language_tag": "en_US", "value": f"Rivet Multicolor Chair {item_id[-1]}"},
        ],
        "item_weight": [{"normalized_value": {"unit": "pounds", "value": 2.5}, "unit": "pounds", "value": 2.5}],
        "product_type": [{"value": "WALL_ART"}],
        "style": [{"language_tag": "en_US", "value": "Vintage"}],
        "main_image_id": image,
        "other_image_id": ["81x"],
        "item_keywords": [{"language_tag": "en_US", "value": "framed-prints"}],
        "country": "US",
        "marketplace": "Amazon",
        "domain_name": "amazon.com",
        "node": [{"node_id": 1, "node_name": "/Home/Wall Art"}],
        **changes,
    }
    return {key: value for key, value in row.items() if value is not None}


@pytest.fixture
def abo(tmp_path: Path) -> Path:
    root = tmp_path / "abo"
    (root / "listings" / "metadata").mkdir(parents=True)
    (root / "images" / "metadata").mkdir(parents=True)
    model = [{"language_tag": "en_US", "value": "Hannah"}]
    shards = [
        [
            abo_row("B0000000A1", "img1", model_name=model),
            abo_row("B0000000A2", "img2", model_name=model, color=[{"language_tag": "en_US", "value": "Sky"}]),
            abo_row(
                "B0000000B3",
                "img3",
                model_number=[{"value": "X-17"}],
                item_name=[{"language_tag": "ja_JP", "value": "カフェ"}],
            ),
            abo_row("B0000000B4", "img4", model_number=[{"value": "x 17"}]),
        ],
        [
            abo_row("B0000000A1", "img1", domain_name="amazon.co.uk", country="GB"),
            abo_row("B0000000C5", None),
            abo_row("B0000000C6", "unknown"),
            abo_row("B0000000C7", "img5"),
            abo_row("B0000000C8", "img6"),
        ],
    ]
    for i, rows in enumerate(shards):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (root / "listings" / "metadata" / f"listings_{i}.json.gz").write_bytes(gzip.compress(text.encode()))
    with gzip.open(root / "images" / "metadata" / "images.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "height", "width", "path"])
        for i in range(1, 7):
            writer.writerow([f"img{i}", 32, 32, f"{i:02d}/{i:02d}abcdef.jpg" if i != 6 else "../../../etc/passwd"])
            if i < 5:
                picture(root / "images" / "small" / f"{i:02d}" / f"{i:02d}abcdef.jpg")
    return root


def test_abo(abo: Path, tmp_path: Path) -> None:
    report = import_catalog("abo", abo, tmp_path / "out")
    assert report.items == 4 and report.groups == 2
    assert report.skipped == {
        "duplicate id": 1,
        "no main image": 1,
        "image id not in images.csv": 2,
        "picture missing": 1,
    }
    assert any("no English name" in note for note in report.notes)
    items = {item.id: item for item in Catalog.load(tmp_path / "out").items}
    first = items["B0000000A1"]
    assert (first.title, first.brand, first.category) == ("Rivet Multicolor Chair 1", "Rivet", "wall art")
    assert (
        first.attributes == {"color": "Multi", "style": "Vintage"} and items["B0000000A2"].attributes["color"] == "Sky"
    )
    assert first.group_id == items["B0000000A2"].group_id != items["B0000000B3"].group_id
    assert items["B0000000B3"].group_id == items["B0000000B4"].group_id
    assert items["B0000000B3"].title == "カフェ"


def test_abo_languages() -> None:
    entries = [{"language_tag": "de_DE", "value": "Stuhl"}, {"language_tag": "en_SG", "value": "Chair"}]
    assert pick_value(entries) == ("Chair", True)
    assert pick_value(entries[:1]) == ("Stuhl", False)
    assert pick_value([{"value": "PLAIN"}]) == ("PLAIN", True)
    for nothing in (None, [], [{}], [5], {}, [{"value": None}], [{"value": " "}]):
        assert pick_value(nothing) == (None, True)


# ---- all of them


def test_arguments(abo: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="source"):
        import_catalog("etsy", abo, tmp_path / "o")
    with pytest.raises(ArgumentError, match="limit"):
        import_catalog("abo", abo, tmp_path / "o", limit=0)
    with pytest.raises(ArgumentError, match="copy"):
        import_catalog("abo", abo, tmp_path / "o", copy="move")  # type: ignore[arg-type]
    report = import_catalog("abo", abo, tmp_path / "o", limit=2, copy="copy")
    assert (report.items, report.copied, report.linked) == (2, 2, 0)
    assert any("limit of 2" in note for note in report.notes) and len(Catalog.load(tmp_path / "o")) == 2
    with pytest.raises(ArgumentError, match="without a catalogue"):
        import_catalog("abo", abo, tmp_path / "o")


@pytest.mark.parametrize("source", PUBLIC)
def test_a_folder_of_something_else_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "other", tmp_path / "absent"):
        with pytest.raises(CatalogError):
            import_catalog(source, path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*metadata*")) if (tmp_path / "out").exists() else True


def test_links_share_the_picture_and_copies_do_not(abo: Path, tmp_path: Path) -> None:
    import_catalog("abo", abo, tmp_path / "link")
    import_catalog("abo", abo, tmp_path / "copy", copy="copy")
    source = os.stat(abo / "images" / "small" / "01" / "01abcdef.jpg")
    assert os.stat(tmp_path / "link" / "images" / "B0000000A1.jpg").st_ino == source.st_ino
    assert os.stat(tmp_path / "copy" / "images" / "B0000000A1.jpg").st_ino != source.st_ino


def test_an_import_with_nothing_usable_leaves_no_catalogue(abo: Path, tmp_path: Path) -> None:
    for image in (abo / "images" / "small").rglob("*.jpg"):
        image.unlink()
    with pytest.raises(CatalogError, match="no usable item"):
        import_catalog("abo", abo, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*metadata*"))
