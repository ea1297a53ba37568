"""What the attention kernels share: key mask, guide, statistics of a softmax, and the merge of softmaxes over parts.

Scores are in base 2 (multiplied by log₂ e) wherever they are exponentiated; statistics leave in base e.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.launch import on_device
from tgq_fast.kernels.tiling import tile

# Neither the value nor the divisibility of these may select a compiled variant: sizes that change from call to call,
# and pointers into a batch, which are aligned for some of its chunks only. A kernel has some of them.
UNSPECIALIZED = [
    "rows", "num_queries", "heads", "length", "first_row", "parts", "n_a", "n_e", "n_t", "mask_first",
    "mask_b", "mask_l", "group_b", "group_l", "guide_b", "guide_l", "num_guided", "stats_p", "o_p",
    "key_mask", "key_group", "guide", "guide_scale", "d_guide_scale", "lse", "entropy", "mass", "delta",
]  # fmt: skip

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_keys(key, length, key_mask, stride, HAS_MASK: tl.constexpr):
    inside = key < length
    if HAS_MASK:
        inside = inside & (tl.load(key_mask + key.to(tl.int64) * stride, mask=inside, other=0) != 0)
    return inside


@triton.jit
def guide_of_rows(guide_scale, head, query, ok, num_guided):
    """(which rows a guide steers, place of their β in [H, Na], β or 0)."""
    guided = ok & (query < num_guided)
    place = head * num_guided + query
    return guided, place, tl.load(guide_scale + place, mask=guided, other=0.0)


@triton.jit
def guide_of_keys(guide, key, visible, stride):
    """Guide of each key, 0 where it is hidden."""
    return tl.load(guide + key.to(tl.int64) * stride, mask=visible, other=0.0)


@triton.jit
def guide_bias(guided, strength, value):
    """What a guide adds to scores in base 2; the arguments broadcast. Rows without a guide never see its values."""
    return tl.where(guided, strength * (value * LOG2E), 0.0)


@triton.jit
def store_statistics(
    lse, entropy, mass, place, ok, top, total, spread, marked, WANT_ENTROPY: tl.constexpr, HAS_GROUP: tl.constexpr
):  # fmt: skip
    """Write the statistics of each row from its sums relative to `top`; returns (any key visible, 1 / total or 0).

    total = Σ exp2(s - top), spread = Σ exp2(s - top) · s, marked = the part of `total` on the marked keys.
    """
    some = total > 0
    inverse = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    log_sum = tl.where(some, (tl.where(some, top, 0.0) + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + place, log_sum, mask=ok)
    if WANT_ENTROPY:
        tl.store(entropy + place, tl.where(some, log_sum - spread * inverse * LN2, 0.0), mask=ok)
    if HAS_GROUP:
        tl.store(mass + place, marked * inverse, mask=ok)
    return some, inverse


@triton.jit
def load_log_sum(lse, ok):
    """(any key visible, log-sum-exp in base 2, 0 where no key is) of rows of the forward."""
    log_sum = tl.load(lse, mask=ok, other=float("-inf"))
    some = log_sum > float("-inf")
    return some, tl.where(some, log_sum, 0.0) * LOG2E


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_parts(
    part_out, part_lse, part_entropy, part_mass, out, lse, entropy, mass,
    rows, parts, heads, num_queries, width, o_b, o_h, o_n,
    WANT_ENTROPY: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows and columns of the result of `parts` softmaxes over disjoint keys; statistics are contiguous [B, H, N]."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    row_ok = row < rows
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row_ok[:, None] & (col[None, :] < width)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(part_lse + part * rows + row, mask=row_ok, other=float("-inf")))
    shift = tl.where(top > float("-inf"), top, 0.0) * LOG2E
    total = tl.zeros([BLOCK_R], tl.float32)
    spread = tl.zeros([BLOCK_R], tl.float32)
    marked = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for part in range(parts):
        place = part * rows + row
        some, log_sum = load_log_sum(part_lse + place, row_ok)
        weight = tl.where(some, tl.exp2(log_sum - shift), 0.0)
        total += weight
        if WANT_ENTROPY:  # Σ p s of a part is its lse - its entropy
            own = tl.load(part_entropy + place, mask=row_ok, other=0.0)
            spread += weight * (log_sum - own * LOG2E)
        if HAS_GROUP:
            marked += weight * tl.load(part_mass + place, mask=row_ok, other=0.0)
        acc += weight[:, None] * tl.load(part_out + place[:, None] * width + col[None, :], mask=inside, other=0.0)
    first = row_ok & (tl.program_id(1) == 0)
    _, inverse = store_statistics(
        lse, entropy, mass, row, first, shift, total, spread, marked, WANT_ENTROPY, HAS_GROUP
    )  # fmt: skip
    item, inner = row // (heads * num_queries), row % (heads * num_queries)
    target = item * o_b + (inner // num_queries) * o_h + (inner % num_queries) * o_n
    tl.store(out + target[:, None] + col[None, :], (acc * inverse[:, None]).to(out.dtype.element_ty), mask=inside)


def merge(
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    out: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    mass: Tensor | None,
) -> None:
    """Combine softmaxes over disjoint groups of keys by their log-sum-exps, in the order of the groups.

    Args:
        parts: pooled values [P, B, H, N, width], lse, entropy and group mass [P, B, H, N], all fp32 and contiguous.
        out: [B, H, N, width], any strides but 1 in the last dimension; lse, entropy, mass: [B, H, N] fp32 contiguous.
    """
    pooled, part_lse, part_entropy, part_mass = parts
    count, batch, heads, queries, width = pooled.shape
    rows = batch * heads * queries
    options = tile("merge_parts", pooled)
    grid = triton.cdiv(rows, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_C"])
    with on_device(out):
        merge_parts[grid](
            pooled, part_lse, part_lse if part_entropy is None else part_entropy,
            part_lse if part_mass is None else part_mass,
            out, lse, lse if entropy is None else entropy, lse if mass is None else mass,
            rows, count, heads, queries, width, *out.stride()[:3],
            WANT_ENTROPY=entropy is not None, HAS_GROUP=mass is not None, **options,
        )  # fmt: skip


def guide_arguments(guide: Tensor | None, guide_scale: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Guide [B, L] and scale [Na, H] as the kernels take them: fp32, the scale as contiguous [H, Na]; and Na.

    Without a guide two tensors that are not read.
    """
    if guide is None or guide_scale is None:
        none = like.new_empty((1, 1), dtype=torch.float32)
        return none, none, 0
    return guide.float(), guide_scale.float().t().contiguous(), guide_scale.shape[0]


def new_statistics(
    shape: tuple[int, ...], device: torch.device, want_entropy: bool, want_mass: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Unwritten lse, entropy and group mass, fp32; None where not asked for."""
    lse, entropy, mass = (
        torch.empty(shape, dtype=torch.float32, device=device) if wanted else None
        for wanted in (True, want_entropy, want_mass)
    )
    return lse, entropy, mass  # type: ignore[return-value]
