"""How a catalogue looks in a notebook: its first items with small pictures, all in one piece of HTML."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from tgq_fast.errors import ImageError

if TYPE_CHECKING:
    from tgq_fast.data.catalog import Catalog
    from tgq_fast.data.items import Item

__all__ = ["catalog_html"]

_ITEMS, _SIDE = 8, 96


def catalog_html(catalog: Catalog) -> str:
    """The number of items and pairs, and the first items as a table."""
    rows = "".join(
        f"<tr><td>{_picture(catalog, item)}</td>"
        + "".join(f"<td>{html.escape(text or '')}</td>" for text in (item.id, item.title, item.category, item.group_id))
        + "</tr>"
        for item in catalog.items[:_ITEMS]
    )
    pairs = ", ".join(f"{name} {counts['pairs']}" for name, counts in catalog.report.splits.items())
    said = f"{html.escape(catalog.report.path)}: {len(catalog)} items; pairs: {html.escape(pairs) or 'none'}"
    head = "<tr><th></th><th>id</th><th>title</th><th>category</th><th>group</th></tr>"
    return f"<table><caption>{said}</caption>{head}{rows}</table>"


def _picture(catalog: Catalog, item: Item) -> str:
    from tgq_fast.data.images import load_image

    if item.file_name is None:
        return ""
    try:
        image = load_image(catalog.picture(item), item.id)
    except ImageError as error:
        return html.escape(error.reason)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'
