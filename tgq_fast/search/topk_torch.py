"""Exact top-k in PyTorch chunks: runs on every device, allocates nothing of size Q × N.

torch.topk breaks ties arbitrarily, so the chunks are ranked by one int64 key that holds the score in its upper and
the complemented row in its lower half: the order is total and ties go to the lower row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tgq_fast.defaults import exact_products
from tgq_fast.reference import TopK
from tgq_fast.search.rules import Rule

_NONE = -(2**63)  # key of what must never be returned; the key of -inf is above it
_LOW = 0xFFFFFFFF
_TILE_SCORES = 1 << 22  # scores in memory at a time
_QUERY_TILE = 1024


def order_keys(scores: Tensor, first_row: int) -> Tensor:
    """int64 keys of fp32 scores [q, n] of pool rows first_row, first_row + 1, …: higher is better, ties to low rows."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0 into +0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    return torch.where(scores.isnan(), _NONE, (ordered << 32) | (_LOW - rows))


def read_keys(keys: Tensor, out: TopK) -> None:
    """Writes the scores and rows of keys [q, k] to `out`; missing hits become (-inf, -1)."""
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    missing = keys == _NONE
    out.scores.copy_(torch.where(missing, float("-inf"), scores))
    out.indices.copy_(torch.where(missing, -1, _LOW - (keys & _LOW)))


def topk_torch(
    queries: Tensor,
    pool: Tensor,
    k: int,
    exclude: Tensor | None,
    out: TopK,
    progress: Callable[[float], None] | None,
    *,
    allowed: Tensor | None = None,
    rules: Sequence[Rule] = (),
) -> TopK:
    """Queries [Q, D] against pool [N, D] here or in host memory, chunk by chunk. Arguments are checked already."""
    num_queries, pool_size = queries.shape[0], pool.shape[0]
    with torch.inference_mode(), exact_products():
        for begin in range(0, num_queries, _QUERY_TILE):
            end = min(begin + _QUERY_TILE, num_queries)
            tile = queries[begin:end].float()  # [q, D]
            best = torch.full((end - begin, k), _NONE, dtype=torch.int64, device=queries.device)
            rows = max(1, _TILE_SCORES // (end - begin))
            for first in range(0, pool_size, rows):
                part = pool[first : first + rows].to(device=tile.device, dtype=torch.float32)
                scores = tile @ part.T  # [q, n]
                keys = order_keys(scores, first)
                if allowed is not None:
                    keys[:, ~allowed[first : first + rows].to(keys.device)] = _NONE
                for rule in rules:
                    met = rule.met(slice(begin, end), slice(first, first + rows))
                    keys[~met.to(keys.device)] = _NONE
                if exclude is not None:
                    _mask(keys, exclude[begin:end] - first)
                keys = keys.topk(min(k, keys.shape[1]), dim=1).values  # keys differ, so this is exact
                best = torch.cat((best, keys), dim=1).topk(k, dim=1).values
                if progress is not None:
                    done = begin + (end - begin) * min(1.0, (first + rows) / pool_size)
                    progress(done / num_queries)
            read_keys(best, TopK(out.scores[begin:end], out.indices[begin:end]))
    return out


def _mask(keys: Tensor, excluded: Tensor) -> None:
    """Takes the excluded columns [q, X] of this chunk out of keys [q, n]."""
    inside = (excluded >= 0) & (excluded < keys.shape[1])
    rows, slots = inside.nonzero(as_tuple=True)
    keys[rows, excluded[rows, slots]] = _NONE
