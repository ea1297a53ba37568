"""Mutated pictures and catalogue files: a typed error or a listed problem, never a crash, a hang or a lost row.

They run in a process of their own, which may end in no other way than well and in bounded time and memory.
`TGQ_FAULTS=full pytest tests/faults` runs the whole campaign instead of a sample.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from tgq_fast.data import Catalog, load_image
from tgq_fast.errors import CatalogError, ImageError

FULL = os.environ.get("TGQ_FAULTS") == "full"
MOST_SECONDS, MOST_BYTES = 5.0, 1 << 30  # of one input; of memory in all
ROWS = 12


def pictures() -> dict[str, bytes]:
    """One good file per format."""
    rng = np.random.default_rng(3)
    pixels = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {
        "JPEG": {"exif": exif},
        "PNG": {},
        "WEBP": {"exif": exif},
        "GIF": {},
        "TIFF": {"compression": "tiff_lzw"},
        "BMP": {},
        "AVIF": {},
    }
    found = {}
    for name, given in options.items():
        if name == "AVIF" and not features.check("avif"):
            continue
        buffer = io.BytesIO()
        image.save(buffer, name, **given)
        found[name] = buffer.getvalue()
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        buffer = io.BytesIO()
        (image.convert("L").convert(mode) if mode.startswith("I") else image.convert(mode)).save(buffer, "PNG")
        found[f"PNG {mode}"] = buffer.getvalue()
    return found


def catalogues() -> dict[str, bytes]:
    """One good metadata file per format, each of ROWS rows."""
    rows = [
        {
            "id": f"i{n}",
            "title": f'Chair "{n}", oak',
            "category": "Chairs",
            "price": 9.5 + n,
            "attributes.colour": "red",
        }
        for n in range(ROWS)
    ]
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    head = ",".join(rows[0])
    lines = [
        ",".join('"' + str(v).replace('"', '""') + '"' if "," in str(v) else str(v) for v in r.values()) for r in rows
    ]
    return {
        "csv": ("\n".join([head, *lines]) + "\n").encode(),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "parquet": table.getvalue(),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few small changes, more often near the beginning, where formats keep their headers."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = int(len(changed) * rng.random() ** rng.choice((1, 1, 4))) if changed else 0
        kind = rng.randrange(7)
        if kind <= 1 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2 and changed:
            changed[min(at, len(changed) - 1)] = rng.choice((0, 0xFF, 0x7F, ord('"'), ord("\n"), ord(","), 0x80))
        elif kind == 3:
            changed[at:at] = bytes(rng.choice((b'"', b"\n", b"\r", b"\x00", b"\xff\xfe", b"{", b",,", b"\xe2\x80\xa8")))
        elif kind == 4:
            del changed[at : at + rng.choice((1, 1, 4, 60))]
        elif kind == 5:
            changed[at:at] = changed[at : at + rng.choice((1, 16, 200))]
        else:
            del changed[max(1, at) :]
    return bytes(changed)


def use_picture(data: bytes) -> str:
    try:
        image = load_image(data, "x")
    except ImageError as error:
        return f"refused: {error.reason}"
    assert image.mode == "RGB" and min(image.size) >= 8
    return "decoded"


def use_catalogue(kind: str, data: bytes, folder: Path) -> str:
    path = folder / f"metadata.{kind}"
    path.write_bytes(data)
    try:
        found = Catalog.load(folder, policy="skip")
    except CatalogError:
        return "refused"
    listed = found.report.problem_count
    if kind == "parquet":
        expected = ROWS
    else:
        text = data.decode("utf-8-sig", errors="replace")
        text = text.replace("\r", "\n") if kind == "csv" else text  # in JSON it is a space
        expected = sum(bool(line.strip().strip(",")) for line in text.split("\n")) - (kind == "csv")
    if len(found) < expected and not listed:
        # A quoted cell may hold line ends: then fewer rows are right, if every line is in some row.
        text = " ".join(str(item) for item in found.items)
        assert kind == "csv" and all(word in text for word in ("i0", f"i{ROWS - 1}") if word.encode() in data), (
            f"{expected - len(found)} of {expected} rows are lost in silence"
        )
    try:
        Catalog.load(folder, policy="raise")
        assert not listed, "problems were listed and then not raised"
    except CatalogError:
        assert listed, "raised, but nothing was listed"
    return "listed" if listed else "read"


def inputs(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    good = {**pictures(), **catalogues()}
    rng = random.Random(seed)
    for number in range(count):
        name = sorted(good)[number % len(good)]
        yield name, mutated(good[name], rng)


def campaign(count: int, seed: int) -> None:
    """Run in a process of its own; prints what came out as JSON."""
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    wrong = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as root:
        for number, (name, data) in enumerate(inputs(count, seed)):
            print(number, name, file=sys.stderr, flush=True)  # the last line tells what ended the process
            begin = time.monotonic()
            try:
                if name in ("csv", "jsonl", "parquet"):
                    folder = Path(root) / str(number)
                    folder.mkdir()
                    outcome = f"{name}: {use_catalogue(name, data, folder)}"
                else:
                    outcome = f"picture: {use_picture(data)}"
                outcomes[outcome] += 1
            except Exception:  # the campaign lists them all
                wrong.append(f"input {number} ({name}): {traceback.format_exc(limit=-2)}")
            if time.monotonic() - begin > MOST_SECONDS:
                wrong.append(f"input {number} ({name}): {time.monotonic() - begin:.1f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"inputs": count, "outcomes": outcomes, "wrong": wrong, "grown": grown}))


@pytest.mark.parametrize("seed", range(4 if FULL else 1))
def test_mutated_input_is_refused_listed_or_read(seed: int) -> None:
    count = 1600 if FULL else 160
    done = subprocess.run(
        [sys.executable, __file__, str(count), str(seed)], capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"inputs": found["inputs"], **found["outcomes"], "grown": found["grown"]}))
    assert not found["wrong"], "\n".join(found["wrong"][:20])
    assert found["grown"] < MOST_BYTES


if __name__ == "__main__":
    campaign(int(sys.argv[1]), int(sys.argv[2]))
