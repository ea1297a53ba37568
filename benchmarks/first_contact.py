"""From a Merchant feed with local pictures to neighbours on a page, in three commands: seconds of each.

    python -m benchmarks.first_contact --json docs/results/scale/first_contact.json

Every command is a process of its own, as typed; the frozen tower is at hand, the feature cache is empty.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.environment import write_figures
from benchmarks.scale_sizes import make_pictures
from benchmarks.serving import served
from tgq_fast.io.files import write_atomic

__all__ = ["main", "write_feed"]


def write_feed(path: Path, products: int) -> None:
    """A feed of products that name the pictures 0.jpg, 1.jpg, …, two of them of one group."""
    items = []
    for number in range(products):
        facts = {
            "id": f"sku-{number}",
            "title": f"Product {number} & Co.",
            "image_link": f"https://shop.example/{number}.jpg",
            "product_type": f"Home > Kind {number % 7}",
            "price": f"{number % 90 + 9}.90 EUR",
            "item_group_id": f"style-{number // 2}",
        }
        items.append("".join(f"<g:{name}>{escape(value)}</g:{name}>" for name, value in facts.items()))
    body = "\n".join(f"<item>{item}</item>" for item in items)
    head = (
        '<?xml version="1.0"?>\n<rss version="2.0" xmlns:g="http://base.google.com/ns/1.0"><channel><title>Shop</title>'
    )
    write_atomic(path, f"{head}\n{body}\n</channel></rss>\n".encode())


def _page(folder: Path, env: dict[str, str], port: int) -> None:
    """Start the server and stop it once it has given neighbours of the first item."""
    with served(Path("pools/first"), port, "/api/neighbours?id=sku-0&k=20", cwd=folder, env=env) as answer:
        hits = answer["hits"]
        assert len(hits) == 20 and all(hit["title"] and hit["picture"] for hit in hits), hits


def main() -> None:
    """See the module."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--products", type=int, default=500, help="at most 500, the number of pictures")
    options.add_argument("--port", type=int, default=8123)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    program = [sys.executable, "-m", "tgq_fast"]
    commands = {
        "import": [*program, "import", "merchant", "feed.xml", "--images", "made/images", "--out", "shop"],
        "embed": [*program, "embed", "shop", "--zero-shot", "whitened", "--out", "pools/first"],
    }
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="tgq-first-contact-") as place:
        folder = Path(place)
        make_pictures(folder / "made", chosen.products)
        write_feed(folder / "feed.xml", chosen.products)
        env = {**os.environ, "TGQ_CACHE": str(folder / "cache")}
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
            seconds[name] = round(time.perf_counter() - begin, 1)
        begin = time.perf_counter()
        _page(folder, env, chosen.port)
        seconds["serve"] = round(time.perf_counter() - begin, 1)
    print(seconds)
    if chosen.json is not None:
        write_figures(chosen.json, products=chosen.products, seconds=seconds)


if __name__ == "__main__":
    main()
