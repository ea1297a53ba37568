"""Planted faults: each is caught by a parity check that the unchanged kernels pass (tests/ops)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planting import caught, load, load_edited

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_checks import check_cross, check_info_nce, check_modulation, check_redundancy, check_streams

CROSS = (2, 2, 3, 21, 20, 16, 2)  # 21 keys: two segments of the interpreter's tile; 20 channels: two chunks
F32 = torch.float32
ACCUMULATE = "HAS_MASK=key_mask is not None, HAS_GUIDE=guided > 0, ACCUMULATE="  # stands twice


def absorbed(length: int = 21, guided: bool = False) -> None:
    check_cross("absorbed", F32, sizes=(*CROSS[:3], length, *CROSS[4:]), mask="some", guided=guided)


def fused(length: int = 21, queries: int = 3, guided: bool = False) -> None:
    check_cross("fused", F32, sizes=(2, 2, queries, length, *CROSS[4:]), mask="some", guided=guided)


def projected(guided: bool = False) -> None:
    check_cross("projected", F32, sizes=(2, 4, 4, 45, 20, 16, 2), mask="some", guided=guided)


def steered() -> None:
    absorbed(37, guided=True)


def streams() -> None:
    check_streams(F32, lengths=(3, 4, 18), heads=1, head=16)


def modulation() -> None:
    check_modulation(F32, sizes=(3, 2, 3, 20, 5, 4))


def groups() -> None:
    check_info_nce(F32, items=19, width=20)


FAULTS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "dropped key mask": (
        "cross_attention",
        "s = tl.where(visible[None, :], s,",
        "s = tl.where(key_ok[None, :], s,",
        absorbed,
    ),
    "scale slip": ("cross_attention", "s *= scale * LOG2E  # base 2", "s *= scale * LOG2E * 1.02", absorbed),
    "last key lost": (
        "cross_attention",
        "        key_ok = key < length\n",
        "        key_ok = key < length - 1\n",
        absorbed,
    ),
    "dropped key mask, fused": (
        "cross_attention_fused",
        "s = tl.where(visible, s,",
        "s = tl.where(key_ok[None, :], s,",
        fused,
    ),
    "scale slip, fused": ("cross_attention_fused", "s *= scale * LOG2E  # base 2", "s *= scale * LOG2E * 1.02", fused),
    "wrong head's weights": ("cross_attention_fused", "(head * head_width + dim)", "(0 * head_width + dim)", fused),
    "last chunk of q' lost": (
        "cross_attention_fused",
        "range(0, width, BLOCK_C)",
        "range(0, width - BLOCK_C, BLOCK_C)",
        fused,
    ),
    "last chunk of O' lost": (
        "cross_attention_fused",
        "range(0, width, BLOCK_O)",
        "range(0, width - 20, BLOCK_O)",
        fused,
    ),
    "not divided by the sum": ("cross_attention_fused", "* inverse[:, None]", "* 1.0", fused),
    "second part of the keys is the first": (
        "cross_attention_fused",
        "key = part * BLOCK_L + tl.arange",
        "key = 0 * BLOCK_L + tl.arange",
        lambda: fused(37),
    ),
    "second tile of queries is the first": (
        "cross_attention_fused",
        "row = (rest % tiles) * BLOCK_N",
        "row = 0 * (rest % tiles) * BLOCK_N",
        lambda: fused(queries=17),
    ),
    "group mass over all keys": ("cross_attention_fused", "tl.where(group[None, :], p, 0.0)", "p", fused),
    "entropy without scores": (
        "cross_attention_fused",
        "tl.where(visible, s, 0.0)",
        "tl.where(visible, 1.0, 0.0)",
        fused,
    ),
    "missing segment in the sum": ("cross_attention", "total = total * keep + partial", "total = partial", absorbed),
    "segment not rescaled": (
        "cross_attention",
        "tl.minimum(maxima[segment] - shift, 0.0)",
        "maxima[segment] * 0.0",
        absorbed,
    ),
    "last chunk of the width lost": (
        "cross_attention",
        "for start in range(0, width, BLOCK_C):",
        "for start in range(0, width - BLOCK_C, BLOCK_C):",
        absorbed,
    ),
    "delta dropped": ("cross_attention_backward", "p * (d_p - dot_out[:, None])", "p * d_p", absorbed),
    "token gradient without values": (
        "cross_attention_backward",
        "weights = weights + (p.to(x.dtype.element_ty),)  # type: ignore[assignment] # noqa: RUF005\n        gradients",
        "weights = weights + ((p * 0).to(x.dtype.element_ty),)\n        gradients",
        absorbed,
    ),
    "groups of keys not accumulated": (
        "cross_attention_backward",
        f"*target.stride()[:3],\n                {ACCUMULATE}first > 0",
        f"*target.stride()[:3],\n                {ACCUMULATE}False",
        lambda: absorbed(37),
    ),
    "groups of rows not accumulated": (
        "cross_attention_backward",
        f"*d_x.stride()[:2],\n                {ACCUMULATE}first > 0",
        f"*d_x.stride()[:2],\n                {ACCUMULATE}False",
        lambda: check_cross("absorbed", F32, sizes=(1, 9, 9, 21, 20, 16, 2)),
    ),
    "parts of the keys weighed alike": ("softmax", "tl.exp2(log_sum - shift)", "1.0", lambda: fused(37)),
    "last group of keys lost": (
        "softmax",
        "for part in range(parts):\n        place",
        "for part in range(parts - 1):\n        place",
        lambda: absorbed(37),
    ),
    "entropy of parts added up": ("softmax", "(log_sum - own * LOG2E)", "log_sum", lambda: fused(37)),
    "guide of the wrong sign": ("softmax", "tl.where(guided, strength *", "tl.where(guided, -strength *", steered),
    "guide for exploratory rows": ("softmax", "guided = ok & (query < num_guided)", "guided = ok", steered),
    "guide of another item": ("cross_attention", "    guide += item * guide_b\n", "", steered),
    "guide missing in the forward, and so in the lse": (
        "cross_attention",
        "s += guide_bias(guided[:, None], strength[:, None], guide_of_keys(",
        "s += 0.0 * guide_bias(guided[:, None], strength[:, None], guide_of_keys(",
        lambda: check_cross("absorbed", F32, sizes=CROSS, guided=True),
    ),
    "guide missing in the backward of the rows": (
        "cross_attention_backward",
        "s += guide_bias(guided[:, None], strength[:, None], value[None, :])",
        "s += 0.0 * guide_bias(guided[:, None], strength[:, None], value[None, :])",
        steered,
    ),
    "guide missing in the backward of the tokens": (
        "cross_attention_backward",
        "s += guide_bias(guided[None, :]",
        "s += 0.0 * guide_bias(guided[None, :]",
        steered,
    ),
    "scale of the guide without the groups before": (
        "cross_attention_backward",
        "steered += tl.load(sums",
        "steered += 0.0 * tl.load(sums",
        steered,
    ),
    "guide missing, fused": (
        "cross_attention_fused",
        "    s += guide_bias(",
        "    s += 0.0 * guide_bias(",
        lambda: fused(37, guided=True),
    ),
    "guide of another item, fused": (
        "cross_attention_fused",
        "guide + item * guide_b",
        "guide",
        lambda: fused(guided=True),
    ),
    "guide missing, projected": (
        "stream_attention",
        "key, seen, guide_l)\n            s += guide_bias(",
        "key, seen, guide_l)\n            s += 0.0 * guide_bias(",
        lambda: projected(guided=True),
    ),
    "guide missing in the backward of projected rows": (
        "stream_attention_backward",
        "visible, guide_l)\n            s += guide_bias(",
        "visible, guide_l)\n            s += 0.0 * guide_bias(",
        lambda: projected(guided=True),
    ),
    "guide missing in the backward of projected keys": (
        "stream_attention_backward",
        "s += guide_bias(guided[None, :]",
        "s += 0.0 * guide_bias(guided[None, :]",
        lambda: projected(guided=True),
    ),
    "another head's scale": (
        "stream_attention",
        "guide_of_rows(guide_scale, head,",
        "guide_of_rows(guide_scale, 0,",
        lambda: projected(guided=True),
    ),
    "gradient of the scale unweighted": (
        "stream_attention_backward",
        "steered += tl.sum(d_scores * value[None, :], 1)",
        "steered += tl.sum(d_scores, 1)",
        lambda: projected(guided=True),
    ),
    "key mask never read": ("softmax", "    if HAS_MASK:\n", "    if False:\n", absorbed),
    "log of the sum forgotten": ("softmax", "tl.log2(tl.where(some, total, 1.0))", "0.0", projected),
    "swapped streams": (
        "stream_attention",
        "start0 = n_a\n            size0 = n_e\n            if SEES_TEXT",
        "start0 = 0\n            size0 = n_a\n            if SEES_TEXT",
        streams,
    ),
    "anchors miss the text": (
        "stream_attention",
        "size1 = n_t\n        elif segment == 1",
        "size1 = 0\n        elif segment == 1",
        streams,
    ),
    "dropped text mask": (
        "stream_attention",
        "    if HAS_MASK:\n        masked",
        "    if False:\n        masked",
        streams,
    ),
    "wrong keys gather rows": (
        "stream_attention_backward",
        "start1 = n_a + n_e\n            size1 = n_t\n            if SEES",
        "start1 = n_a\n            size1 = n_t\n            if SEES",
        streams,
    ),
    "running maximum not applied": (
        "stream_attention",
        "total = total * keep + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        projected,
    ),
    "anchored gate misses the explorers": (
        "modulation",
        "hidden_a = tl.dot(me.to(dtype), tl.trans(wae), hidden_a",
        "hidden_a = tl.dot(me.to(dtype) * 0, tl.trans(wae), hidden_a",
        modulation,
    ),
    "residual scale slip": ("modulation", "1.0 + alpha * ga, item", "1.0 + ga, item", modulation),
    "sigmoid slope": ("modulation", "0.5 * (1.0 - g * g)", "0.5 * (1.0 - g)", modulation),
    "mean gradient not shared out": ("modulation", "dma / tl.maximum(n_a, 1)", "dma", modulation),
    "group mask dropped": (
        "info_nce",
        "    if HAS_GROUPS:\n        hidden = hidden |",
        "    if False:\n        hidden = hidden |",
        groups,
    ),
    "self not masked": (
        "info_nce",
        "hidden = item[None, :] == anchor[:, None]",
        "hidden = item[None, :] == -1 - anchor[:, None]",
        groups,
    ),
    "positive not subtracted": ("info_nce", "g -= tl.where", "g -= 0.0 * tl.where", groups),
    "blocks merged without their distance": (
        "redundancy",
        "+ shift_a * shift_e * cross",
        "+ shift_a * shift_e * 0.0",
        lambda: check_redundancy(F32),
    ),
}

USERS_OF_SOFTMAX = (
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_fused",
    "stream_attention",
    "stream_attention_backward",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, before, after, check = FAULTS[fault]
    kernels = importlib.import_module("tgq_fast.kernels")
    original = importlib.import_module(f"tgq_fast.kernels.{name}")
    mutant = load_edited(original, before, after, tmp_path)
    monkeypatch.setattr(kernels, name, mutant)
    if name == "softmax":  # the kernels that import from it are loaded again
        users = [importlib.import_module(f"tgq_fast.kernels.{user}") for user in USERS_OF_SOFTMAX]
        monkeypatch.setitem(sys.modules, original.__name__, mutant)
        for user in users:
            short = user.__name__.rpartition(".")[2]
            monkeypatch.setattr(kernels, short, load(Path(user.__file__), f"mutant_{short}"))
    caught(check)
