"""The rule that picks guiding fields when nobody names them."""

from __future__ import annotations

from pathlib import Path

from tgq_fast.data import Catalog
from tgq_fast.data.guides import field_facts, suggest_fields
from tgq_fast.data.items import Item


def catalogue(count: int = 80) -> Catalog:
    items = []
    for i in range(count):
        group = i // 4
        attributes = {
            "gender": ("Women", "Men")[group % 2],
            "colour": ("red", "blue", "green", "black")[i % 4],
            "department": ("upper", "lower")[group % 4 // 2],
            "maker_code": f"code {group}" if i % 4 == 0 else "",
            "shop": "only one",
        }
        attributes = {name: value for name, value in attributes.items() if value}
        items.append(
            Item(
                id=f"i{i}",
                title=f"product {group}",
                brand=f"brand {group % 7}",
                category=("shirt", "blouse", "shoe", "boot")[group % 4],
                attributes=attributes,
                price=float(group),
                group_id=f"g{group}",
            )
        )
    return Catalog.from_items(items)


def test_only_descriptive_agreeing_and_new_fields_guide() -> None:
    reasons = {facts.name: facts.reason for facts in field_facts(catalogue())}
    assert [name for name, reason in reasons.items() if not reason] == ["category"]
    assert "identifies" in reasons["title"] and "identifies" in reasons["brand"] and "identifies" in reasons["price"]
    assert "agree" in reasons["colour"]
    assert "missing" in reasons["maker_code"]
    assert "one value" in reasons["shop"]
    assert "implied" in reasons["department"] and "implied" in reasons["gender"]


def test_too_many_values_do_not_guide() -> None:
    items = [Item(id=str(i), category=f"c{i % 120}", group_id=f"g{i % 120}") for i in range(480)]
    (facts,) = field_facts(Catalog.from_items(items))
    assert "more than 100" in facts.reason and facts.agreement == 1.0


def test_real_fashion_is_guided_without_names(shared_data: Path) -> None:
    catalog = Catalog.load(shared_data / "fashion")
    assert suggest_fields(catalog) == ["category", "gender", "season", "usage", "year"]


def test_real_groceries_are_guided_by_category(shared_data: Path) -> None:
    assert suggest_fields(Catalog.load(shared_data / "grocery")) == ["category"]
