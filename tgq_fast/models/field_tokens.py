"""Metadata fields as tokens: one frozen encoding per unique "name: value" string, packed per item."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tgq_fast.models.feature_files import ChunkedArray
from tgq_fast.models.outputs import DistinctTokens
from tgq_fast.models.towers import TextTower

__all__ = ["FieldEncoder", "PackedFields", "field_strings", "pack_fields", "pack_rows", "text_agreement"]
__all__ += ["string_tokens"]

_STRINGS = 256  # strings per journal entry of their cache


class HasFields(Protocol):
    """Anything that answers :meth:`tgq_fast.data.Item.field`."""

    def field(self, name: str) -> str | None: ...


def field_strings(item: HasFields, fields: Sequence[str]) -> list[str | None]:
    """One "name: value" string per field in the order of `fields`; None where the item lacks it."""
    values = [item.field(name) for name in fields]
    return [None if value is None else f"{name}: {value}" for name, value in zip(fields, values, strict=True)]


@dataclass(frozen=True)
class PackedFields:
    """Metadata tokens of B items, packed to the left.

    Attributes:
        tokens: [B, M', dt] fp32, mask [B, M'] bool and field_ids [B, M'] int64 (1 … F, 0 for padding), where M' ≥ 1 is
            the longest item's length.
        distinct: the same without repetition.
    """

    tokens: Tensor
    mask: Tensor
    field_ids: Tensor
    distinct: DistinctTokens


def pack_fields(
    items: Sequence[Sequence[Tensor | None]],
    width: int,
    max_tokens: int,
    *,
    strings: Sequence[Sequence[str | None]] | None = None,
) -> PackedFields:
    """Concatenate each item's field tokens; the same tensor for several items counts as the same value.

    Args:
        items: per item, one [m, dt] tensor or None per field, in the order of `config.fields`.
        width: dt.
        max_tokens: the cap M; later tokens are cut.
        strings: what the tensors encode. Distinct tokens are then in the strings' order, as in the feature cache.
    """
    values = {id(value): value for row in items for value in row if value is not None}
    if strings is not None:
        names = {id(v): s for row, named in zip(items, strings, strict=True) for v, s in zip(row, named, strict=True)}
        values = {key: values[key] for key in sorted(values, key=lambda key: str(names[key]))}
    numbers = {key: number for number, key in enumerate(values)}
    ids = np.array([[-1 if v is None else numbers[id(v)] for v in row] for row in items], dtype=np.int64)
    offsets = np.cumsum([0, *(len(value) for value in values.values())])
    table = torch.cat([torch.zeros(0, width, dtype=torch.float32), *values.values()]).float()
    return pack_rows(ids.reshape(len(items), -1), offsets, lambda rows: table[torch.from_numpy(rows)], max_tokens)


def pack_rows(
    ids: NDArray[np.integer[Any]],
    offsets: NDArray[np.integer[Any]],
    read: Callable[[NDArray[np.int64]], Tensor],
    max_tokens: int,
) -> PackedFields:
    """:func:`pack_fields` for values that lie one after the other in a table.

    Args:
        ids: [B, F] which value each field has, -1 for none.
        offsets: [V + 1] where the tokens of each value begin.
        read: table rows [U] → their tokens [U, dt] fp32.
        max_tokens: the cap M.
    """
    batch, num_fields = ids.shape
    sizes = np.where(ids >= 0, offsets[ids + 1] - offsets[ids], 0) if len(offsets) > 1 else np.zeros_like(ids)
    counts = sizes.reshape(-1)  # tokens per item and field, in the order in which they are packed
    total = int(counts.sum())
    starts = np.concatenate(([0], np.cumsum(counts)))[:-1]
    entry = np.repeat(np.arange(counts.size), counts)  # which item and field a token belongs to
    row = offsets[ids.reshape(-1)[entry]] + np.arange(total) - starts[entry] if total else np.zeros(0, np.int64)
    item, field = entry // max(1, num_fields), entry % max(1, num_fields) + 1
    place = np.arange(total) - np.concatenate(([0], np.cumsum(sizes.sum(axis=1))))[item]
    kept = place < max_tokens
    row, item, field, place = row[kept], item[kept], field[kept], place[kept]
    # A token is told from another by its row and its field.
    keys, index = np.unique(row * (num_fields + 1) + field, return_inverse=True)
    length = max(1, int(place.max(initial=-1)) + 1)
    indices = np.zeros((batch, length), dtype=np.int64)
    indices[item, place] = index + 1
    tokens = read(keys // (num_fields + 1))
    tokens = torch.cat((tokens.new_zeros(1, tokens.shape[1]), tokens))
    fields = np.concatenate(([0], keys % (num_fields + 1)))
    distinct = DistinctTokens(tokens, torch.from_numpy(fields), torch.from_numpy(indices))
    dense = nn.functional.embedding(distinct.index, tokens)
    return PackedFields(dense, distinct.index > 0, distinct.field_ids[distinct.index], distinct)


def text_agreement(global_image: Tensor, pooled: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Cosine of the dual encoder's image feature and the mean of its normalised field features [ours].

    The mean over separately encoded fields stands in for one joined text: it keeps fields cacheable and droppable.

    Args:
        global_image: [B, dg].
        pooled: per item, one [dg] tensor or None per field.

    Returns:
        [B] fp32 in [-1, 1], 0 for an item without metadata.
    """
    text = torch.zeros(global_image.shape, dtype=torch.float32)
    for i, row in enumerate(pooled):
        present = [p for p in row if p is not None]
        if present:
            text[i] = torch.stack(present).float().mean(dim=0)
    return nn.functional.cosine_similarity(global_image.float(), text, dim=-1)


class FieldEncoder:
    """A text tower with a bounded memory of the strings it has seen.

    Args:
        tower: frozen text tower.
        capacity: how many unique strings to keep.
    """

    def __init__(self, tower: TextTower, *, capacity: int = 100_000) -> None:
        self.tower, self.capacity = tower, capacity
        self._seen: OrderedDict[str, tuple[Tensor, Tensor | None]] = OrderedDict()

    def __call__(
        self, items: Sequence[Sequence[str | None]]
    ) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
        """Per item and field: tokens [m, dt] and, for a dual encoder, the pooled feature [dp] (else None)."""
        wanted = sorted({s for row in items for s in row if s is not None})
        found = {s: seen for s in wanted if (seen := self._seen.get(s)) is not None}  # other threads add and drop
        new = [s for s in wanted if s not in found]
        if new:
            tokens = self.tower.encode_fields(new)
            pooled = self.tower.encode_pooled(new) if self.tower.pooled_width else [None] * len(new)
            for string, t, p in zip(new, tokens, pooled, strict=True):
                # fp16 as in the feature cache, so that both paths give the same values.
                found[string] = (t.half().float(), None if p is None else p.half().float())
        self._seen.update(found)
        while len(self._seen) > self.capacity:
            self._seen.popitem(last=False)
        each = [[(None, None) if s is None else found[s] for s in row] for row in items]
        return [[t for t, _ in row] for row in each], [[p for _, p in row] for row in each]


def string_tokens(strings: list[str], text: TextTower, root: Path, verify: bool) -> ChunkedArray:
    """The cache of the tokens of unique metadata strings."""
    digest = hashlib.sha256(json.dumps(strings).encode()).hexdigest()
    key = hashlib.sha256(f"text-2|{text.key}|{text.tokenizer_key}|{digest}|{_STRINGS}".encode()).hexdigest()
    layout: dict[str, tuple[str, list[int]]] = {"lengths": ("<i4", [])}
    if text.pooled_width:
        layout["pooled"] = ("<f2", [text.pooled_width])
    array = ChunkedArray(
        root / "fields" / key[:32],
        layout,
        rows=len(strings),
        chunk=_STRINGS,
        ragged={"tokens": ("<f2", [text.width])},
        facts={"tower": text.key, "strings": digest},
    )
    with array.building(verify=verify) as todo:
        for number in todo:
            chunk = strings[number * _STRINGS : (number + 1) * _STRINGS]
            tokens = text.encode_fields(chunk)
            values = {
                "lengths": np.array([len(t) for t in tokens], np.int32),
                "tokens": torch.cat(tokens).half().numpy(),
            }
            if text.pooled_width:
                values["pooled"] = text.encode_pooled(chunk).half().numpy()
            array.append(values, [])
    array.set("offsets", np.concatenate([[0], np.cumsum(array["lengths"], dtype=np.int64)]))
    return array
