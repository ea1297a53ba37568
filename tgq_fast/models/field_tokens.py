"""Metadata fields as tokens: one frozen encoding per unique "name: value" string, packed per item."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from tgq_fast.models.towers import TextTower

__all__ = ["FieldEncoder", "field_strings", "pack_fields", "text_agreement"]


class HasFields(Protocol):
    """Anything that answers :meth:`tgq_fast.data.Item.field`."""

    def field(self, name: str) -> str | None: ...


def field_strings(item: HasFields, fields: Sequence[str]) -> list[str | None]:
    """One "name: value" string per field in the order of `fields`; None where the item lacks it."""
    values = [item.field(name) for name in fields]
    return [None if value is None else f"{name}: {value}" for name, value in zip(fields, values, strict=True)]


def pack_fields(items: Sequence[Sequence[Tensor | None]], width: int, max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate each item's field tokens, packed to the left.

    Args:
        items: per item, one [m, dt] tensor or None per field, in the order of `config.fields`.
        width: dt.
        max_tokens: the cap M; later tokens are cut.

    Returns:
        tokens [B, M', dt] fp32, mask [B, M'] bool and field ids [B, M'] int64 (1 … F, 0 for padding), where M' ≥ 1 is
        the longest item's length.
    """
    lengths = [min(max_tokens, sum(len(t) for t in row if t is not None)) for row in items]
    longest = max([1, *lengths])
    tokens = torch.zeros(len(items), longest, width)
    field_ids = torch.zeros(len(items), longest, dtype=torch.int64)
    for i, row in enumerate(items):
        at = 0
        for number, encoded in enumerate(row, start=1):
            if encoded is None or at >= lengths[i]:
                continue
            piece = encoded[: lengths[i] - at]
            tokens[i, at : at + len(piece)] = piece
            field_ids[i, at : at + len(piece)] = number
            at += len(piece)
    return tokens, field_ids > 0, field_ids


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
        new = [s for s in wanted if s not in self._seen]
        found = {s: self._seen[s] for s in wanted if s in self._seen}
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
