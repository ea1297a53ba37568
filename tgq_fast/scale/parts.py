"""Parts: pieces of the stretches of an embedding run, what identifies them, and finished ones on disk.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tgq_fast.data import Catalog
from tgq_fast.data.items import COLUMNS
from tgq_fast.io.files import write_atomic
from tgq_fast.io.identity import canonical_json
from tgq_fast.io.json_text import read_json
from tgq_fast.pool.embed_parts import EmbeddedPart, PartOptions
from tgq_fast.pool.embed_plan import content_keys

__all__ = ["Part", "cut", "is_current", "part_path", "read_part", "write_part"]

BATCHES_PER_PART = 8
"""What a lost worker costs, in batches; a whole number of them, so that batches are those of a single process."""


@dataclass
class Part:
    """Rows of one stretch that one worker embeds at once.

    Attributes:
        stretch: number of the stretch.
        rows: of the catalogue.
        key: names the model, the options and the rows with their metadata; of the pictures only the file names.
        refused: items that are left out, by id: (reason, detail).
    """

    stretch: int
    rows: list[int]
    key: str
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)


def cut(
    catalog: Catalog, stretches: Sequence[Sequence[int]], options: PartOptions, batches: int = BATCHES_PER_PART
) -> list[Part]:
    """Parts of `batches` batches, or what is left at a stretch's end."""
    size = batches * options.batch_size
    parts = []
    for number, stretch in enumerate(stretches):
        for start in range(0, len(stretch), size):
            rows = list(stretch[start : start + size])
            parts.append(Part(number, rows, part_key(catalog, rows, options)))
    return parts


def part_key(catalog: Catalog, rows: Sequence[int], options: PartOptions) -> str:
    """32 hex digits."""
    how = {name: value for name, value in asdict(options).items() if name != "threads"}
    state = hashlib.sha256(canonical_json(how).encode())
    for row in rows:
        item = catalog.items[row]
        names = [*COLUMNS, *sorted(item.attributes)] if options.fields is None else options.fields
        told = [item.id, item.row, item.file_name, [[name, item.field(name)] for name in names]]
        state.update(json.dumps(told).encode())
    return state.hexdigest()[:32]


def part_path(folder: Path, part: Part) -> Path:
    """Where a finished part lies."""
    return folder / f"part-{part.key}.safetensors"


def write_part(folder: Path, part: Part, done: EmbeddedPart) -> None:
    """Keep a finished part until it is committed; the file appears whole, and its bytes are always the same."""
    body = {
        "ids": done.ids,
        "content": [key.hex() for key in done.content],
        "refused": done.refused,
        "reject_lines": done.reject_lines,
        "sha256": _digest(done.vectors),
    }
    vectors = done.vectors.contiguous()
    write_atomic(part_path(folder, part), save({"embeddings": vectors}, {"part": canonical_json(body)}))


def read_part(folder: Path, part: Part, width: int) -> EmbeddedPart | None:
    """A finished part, if it is there and undamaged."""
    path = part_path(folder, part)
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        body = read_json(read_json(data[8 : 8 + size])["__metadata__"]["part"])
        vectors = load(data)["embeddings"]
        if vectors.shape != (len(body["ids"]), width) or _digest(vectors) != body["sha256"]:
            return None
        keys = [bytes.fromhex(key) for key in body["content"]]
        done = EmbeddedPart(body["ids"], vectors, keys, body["refused"], body["reject_lines"])
        return done if len(keys) == len(vectors) and _content_of(done.reject_lines) is not None else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def is_current(catalog: Catalog, part: Part, done: EmbeddedPart, options: PartOptions) -> bool:
    """Whether the items still hold what was embedded; reads their pictures."""
    known = dict(zip(done.ids, done.content, strict=True)) | _content_of(done.reject_lines)
    items = [catalog.items[row] for row in part.rows]
    now = content_keys(catalog, items, options.fields, workers=options.threads)
    return len(known) == len(items) and all(known.get(i.id) == key for i, key in zip(items, now, strict=True))


def _content_of(reject_lines: str) -> dict[str, bytes]:
    """Content keys of refused items by their ids."""
    return {str(line["item_id"]): bytes.fromhex(line["content"]) for line in map(read_json, reject_lines.splitlines())}


def _digest(vectors: torch.Tensor) -> str:
    return hashlib.sha256(vectors.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
