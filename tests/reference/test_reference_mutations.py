"""The checks of the reference can fail: each broken reference below is caught by one of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import reference_checks as checks
from planting import caught, load_edited

from tgq_fast.reference import modulation, topk

# Modules whose names in the package are those of their functions, or not there.
cross_attention, stream_attention, info_nce, redundancy = (
    importlib.import_module(f"tgq_fast.reference.{name}")
    for name in ("cross_attention", "stream_attention", "info_nce", "redundancy")
)


def projected(ref: ModuleType) -> None:
    checks.check_cross_attention(ref, "projected")


def absorbed(ref: ModuleType) -> None:
    checks.check_cross_attention(ref, "absorbed")


MUTATIONS: list[tuple[str, ModuleType, str, str, Callable]] = [
    (
        "key mask dropped",
        cross_attention,
        "visible = None if key_mask is None else key_mask[:, None, None, :]",
        "visible = None",
        projected,
    ),
    ("key mask inverted", cross_attention, "hidden = ~visible", "hidden = visible", absorbed),
    (
        "streams swapped",
        cross_attention,
        "torch.cat((anchored, exploratory), dim=1)",
        "torch.cat((exploratory, anchored), dim=1)",
        projected,
    ),
    (
        "streams split off by one",
        cross_attention,
        "context[:, num_anchored:], stats",
        "context[:, num_anchored - 1 : -1], stats",
        projected,
    ),
    (
        "scale slip",
        cross_attention,
        "q = linear(queries, q_weight, q_bias) * head**-0.5",
        "q = linear(queries, q_weight, q_bias) * width**-0.5",
        projected,
    ),
    (
        "query bias after the scale",
        cross_attention,
        "q = linear(queries, q_weight, q_bias) * head**-0.5",
        "q = linear(queries, q_weight) * head**-0.5 + q_bias",
        projected,
    ),
    ("value bias dropped", cross_attention, "context + v_bias * some", "context", absorbed),
    (
        "value bias for items that see nothing",
        cross_attention,
        "context + v_bias * some",
        "context + v_bias",
        projected,
    ),
    (
        "heads mixed up",
        cross_attention,
        "wk = k_weight.view(num_heads, head, -1)",
        "wk = k_weight.view(head, num_heads, -1).transpose(0, 1)",
        absorbed,
    ),
    (
        "value of the wrong head",
        cross_attention,
        'bhnv,hcv->bnhc", pooled, wv',
        'bhnv,hcv->bnhc", pooled, wv.flip(0)',
        absorbed,
    ),
    (
        "lse over masked keys",
        cross_attention,
        'scores = scores.masked_fill(~visible, float("-inf"))\n    lse',
        "pass\n    lse",
        checks.check_statistics,
    ),
    ("entropy sign", cross_attention, "lse - expected", "expected - lse", checks.check_statistics),
    (
        "guide of the wrong sign",
        cross_attention,
        "bias = guide_scale.t()[None",
        "bias = -guide_scale.t()[None",
        checks.check_guide,
    ),
    (
        "guide for exploratory queries",
        cross_attention,
        "pad(bias, (0, 0, 0, num_queries - guide_scale.shape[0]))",
        "bias[:, :, :1].expand(-1, -1, num_queries, -1)",
        checks.check_guide,
    ),
    (
        "guide read at hidden keys",
        cross_attention,
        "guide = guide.masked_fill(~key_mask, 0.0)",
        "pass",
        checks.check_guide,
    ),
    (
        "scale of the guide without gradient",
        cross_attention,
        "guide_scale.t()[None",
        "guide_scale.detach().t()[None",
        checks.check_guide,
    ),
    (
        "group ignored",
        cross_attention,
        "key_group.to(p.dtype)",
        "key_group.to(p.dtype) * 0 + 1",
        checks.check_statistics,
    ),
    ("A does not see T", stream_attention, "mask[a, a] = mask[a, t] =", "mask[a, a] =", checks.check_self_attention),
    (
        "E sees A",
        stream_attention,
        "mask[e, e] = mask[t, t]",
        "mask[e, e] = mask[e, a] = mask[t, t]",
        checks.check_self_attention,
    ),
    ("T sees A", stream_attention, "mask[t, t] = True", "mask[t, t] = mask[t, a] = True", checks.check_self_attention),
    ("one_way the other way", stream_attention, "mask[a, e] = True", "mask[e, a] = True", checks.check_self_attention),
    (
        "text mask on the wrong columns",
        stream_attention,
        "keys[:, t] = text_mask",
        "keys[:, : text_mask.shape[1]] = text_mask",
        checks.check_self_attention,
    ),
    (
        "text mask on rows",
        stream_attention,
        "mask & keys[:, None, None, :]",
        "mask & keys[:, None, :, None]",
        checks.check_self_attention,
    ),
    ("sigmoid not centred", modulation, "torch.tanh(z * 0.5)", "torch.sigmoid(z)", checks.check_modulation),
    ("factor 2 missing", modulation, "torch.tanh(z * 0.5)", "torch.tanh(z)", checks.check_modulation),
    (
        "gate without residual",
        modulation,
        "anchored * (1 + alpha * gate_a)",
        "anchored * (alpha * gate_a)",
        checks.check_modulation,
    ),
    (
        "α forgotten",
        modulation,
        "exploratory * (1 + alpha * gate_e)",
        "exploratory * (1 + gate_e)",
        checks.check_modulation,
    ),
    (
        "gates swapped",
        modulation,
        "anchored * (1 + alpha * gate_a)",
        "anchored * (1 + alpha * gate_e)",
        checks.check_modulation,
    ),
    (
        "anchored gate blind to E",
        modulation,
        "(flags, v_g, mean_a, mean_e, *more)",
        "(flags, v_g, mean_a, mean_a, *more)",
        checks.check_modulation,
    ),
    (
        "flag and agreement swapped",
        modulation,
        "(agreement.to(dtype), has_metadata.to(dtype))",
        "(has_metadata.to(dtype), agreement.to(dtype))",
        checks.check_modulation,
    ),
    (
        "tanh GELU",
        modulation,
        "gelu(linear(x, self.w1, self.b1))",
        "gelu(linear(x, self.w1, self.b1), approximate='tanh')",
        checks.check_modulation,
    ),
    (
        "self not masked",
        info_nce,
        "masked = columns == rows[:, None]",
        "masked = columns == -1 - rows[:, None]",
        checks.check_info_nce,
    ),
    ("positive masked", info_nce, "masked = masked & (columns != positives[:, None])", "pass", checks.check_info_nce),
    ("groups of -1 masked", info_nce, " & (groups >= 0)", "", checks.check_info_nce),
    ("scale not exponential", info_nce, "log_scale.to(dtype).exp()", "log_scale.to(dtype)", checks.check_info_nce),
    ("sum for mean", info_nce, "picked).mean()", "picked).sum()", checks.check_info_nce),
    ("not centred", redundancy, "a, e = a - a.mean(dim=0), e - e.mean(dim=0)", "pass", checks.check_redundancy),
    (
        "covariance for correlation",
        redundancy,
        "(covariance.square() / variance)",
        "covariance.square()",
        checks.check_redundancy,
    ),
    (
        "square forgotten",
        redundancy,
        "(covariance.square() / variance)",
        "(covariance / variance.sqrt())",
        checks.check_redundancy,
    ),
    (
        "ties to the higher index",
        topk,
        'torch.where(valid, scores, float("-inf")).sort(dim=1, descending=True, stable=True)',
        'torch.where(valid, scores, float("-inf")).flip(1).sort(dim=1, descending=True, stable=True)',
        checks.check_topk,
    ),
    (
        "ascending",
        topk,
        'float("-inf")).sort(dim=1, descending=True, stable=True).indices\n    order = order.gather',
        'float("-inf")).sort(dim=1, descending=False, stable=True).indices\n    order = order.gather',
        checks.check_topk,
    ),
    (
        "NaN returned",
        topk,
        "valid = ~torch.isnan(scores)",
        "valid = torch.ones_like(scores, dtype=torch.bool)",
        checks.check_topk,
    ),
    ("exclusion of -1 taken as the last row", topk, "hit = column >= 0", "hit = column >= -1", checks.check_topk),
    ("missing hits keep an index", topk, "index = torch.where(kept, order, -1)", "index = order", checks.check_topk),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_mutation_is_caught(module: ModuleType, old: str, new: str, check: Callable, tmp_path: Path) -> None:
    caught(check, load_edited(module, old, new, tmp_path))


@pytest.mark.parametrize(
    "module", [cross_attention, stream_attention, modulation, info_nce, redundancy, topk], ids=lambda m: m.__name__
)
def test_unchanged_copy_passes(module: ModuleType, tmp_path: Path) -> None:
    """The copy that mutations start from is sound, so what fails above is the change."""
    first = "from __future__ import annotations"
    copy = load_edited(module, first, f"{first}  # copied", tmp_path)
    for check in {m[4] for m in MUTATIONS if m[1] is module}:
        check(copy)
