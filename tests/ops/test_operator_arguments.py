"""Operators called with what is no argument of theirs: a typed error that names it, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tgq_fast import ops, reference
from tgq_fast.errors import ArgumentError

B, NA, NE, L, D, DV, H = 2, 3, 4, 5, 8, 6, 2


def gates() -> list[reference.GateParameters]:
    return [
        reference.GateParameters(torch.randn(4, width), torch.randn(4), torch.randn(D, 4), torch.randn(D))
        for width in (2 + DV + 2 * D, DV + D)
    ]


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "hybrid_cross_attention": (
        ops.hybrid_cross_attention,
        {
            "anchored": torch.randn(B, NA, D),
            "exploratory": torch.randn(B, NE, D),
            "visual": torch.randn(B, L, DV),
            "q_weight": torch.randn(D, D),
            "q_bias": torch.randn(D),
            "k_weight": torch.randn(D, DV),
            "k_bias": torch.randn(D),
            "v_weight": torch.randn(D, DV),
            "v_bias": torch.randn(D),
            "num_heads": H,
            "key_mask": torch.ones(B, L, dtype=torch.bool),
            "key_group": torch.ones(B, L, dtype=torch.bool),
            "guide": torch.randn(B, L),
            "guide_scale": torch.randn(NA, H),
            "return_stats": True,
            "form": "auto",
            "backend": "torch",
        },
    ),
    "stream_self_attention": (
        ops.stream_self_attention,
        {
            "q": torch.randn(B, 7, H, 4),
            "k": torch.randn(B, 7, H, 4),
            "v": torch.randn(B, 7, H, 4),
            "lengths": (2, 3, 2),
            "mixing": "block",
            "text_mask": torch.ones(B, 2, dtype=torch.bool),
            "backend": "torch",
        },
    ),
    "dual_gated_modulation": (
        ops.dual_gated_modulation,
        {
            "anchored": torch.randn(B, NA, D),
            "exploratory": torch.randn(B, NE, D),
            "agreement": torch.randn(B),
            "has_metadata": torch.ones(B),
            "global_image": torch.randn(B, DV),
            "anchored_parameters": gates()[0],
            "exploratory_parameters": gates()[1],
            "alpha": 1.0,
            "backend": "torch",
        },
    ),
    "info_nce": (
        ops.info_nce,
        {
            "embeddings": torch.randn(6, 4),
            "positives": torch.tensor([1, 0, 3, 2, 5, 4]),
            "log_scale": torch.tensor(1.0),
            "groups": torch.tensor([0, 0, 1, 1, 2, 2]),
            "rows": torch.arange(6),
            "backend": "torch",
        },
    ),
    "redundancy_loss": (
        ops.redundancy_loss,
        {"anchored": torch.randn(B, D), "exploratory": torch.randn(B, D), "eps": 1e-6, "backend": "torch"},
    ),
}
OPTIONAL = {"q_bias", "k_bias", "v_bias", "key_mask", "key_group", "text_mask", "groups", "rows", "backend"}
ODD: list[Any] = ["x", 3, -1, 2.5, object(), [1.0], (), {}, np.zeros((2, 2), np.float32), torch.zeros(1, 1, 1, 1, 1)]
PAIRS = [(name, parameter) for name, (_, arguments) in CALLS.items() for parameter in arguments]


@pytest.mark.parametrize(("name", "parameter"), PAIRS)
def test_what_is_no_argument_is_named(name: str, parameter: str) -> None:
    call, arguments = CALLS[name]
    call(**arguments)
    for odd in [*ODD, *([] if parameter in OPTIONAL else [None])]:
        if parameter in ("return_stats",) or (parameter in ("alpha", "eps") and isinstance(odd, (int, float))):
            continue
        for given in (call, lambda **options: ops.explain(name, **options)):
            with pytest.raises(ArgumentError) as caught:
                given(**{**arguments, parameter: odd})
            named = parameter.removeprefix("guide_scale").removeprefix("guide") or "guide"
            assert named in str(caught.value), (odd, str(caught.value))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("hybrid_cross_attention", {"key_mask": torch.ones(B, L)}, "key_mask: got torch.float32"),
        ("hybrid_cross_attention", {"key_mask": torch.ones(1, L, dtype=torch.bool)}, "key_mask"),
        ("hybrid_cross_attention", {"key_group": torch.full((B, L), 2)}, "key_group"),
        ("hybrid_cross_attention", {"k_weight": torch.randn(D, D)}, r"k_weight: got shape \(8, 8\), expected \[8, 6\]"),
        ("hybrid_cross_attention", {"v_bias": torch.randn(H)}, "v_bias"),
        ("hybrid_cross_attention", {"num_heads": True}, "num_heads"),
        ("hybrid_cross_attention", {"num_heads": 0}, "num_heads"),
        ("hybrid_cross_attention", {"keys_values": [torch.zeros(B, L, D)]}, "keys_values"),
        ("hybrid_cross_attention", {"keys_values": (torch.zeros(B, L, D), torch.zeros(B, L + 1, D))}, "keys_values"),
        ("hybrid_cross_attention", {"guide": torch.zeros(B, L), "guide_scale": None}, "guide_scale"),
        ("stream_self_attention", {"k": torch.randn(B, 6, H, 4)}, "k: got shape"),
        ("stream_self_attention", {"lengths": (9, -2, 0)}, "lengths"),
        ("stream_self_attention", {"lengths": (2.0, 3.0, 2.0)}, "lengths"),
        ("stream_self_attention", {"text_mask": torch.ones(B, 7, dtype=torch.bool)}, "text_mask"),
        ("dual_gated_modulation", {"agreement": torch.randn(B + 1)}, "agreement"),
        ("dual_gated_modulation", {"global_image": torch.randn(B + 1, DV)}, "global_image"),
        ("dual_gated_modulation", {"anchored_parameters": gates()[0]._replace(b1=None)}, "anchored_parameters.b1"),
        ("dual_gated_modulation", {"anchored_parameters": gates()[0]._replace(b2=torch.ones(1))}, "b2"),
        ("info_nce", {"positives": torch.tensor([1.0, 0, 3, 2, 5, 4])}, "positives: got torch.float32"),
        ("info_nce", {"positives": torch.tensor([1, 0, 3, 2, 5, 6])}, r"positives: got 0 … 6, expected items in 0 … 5"),
        ("info_nce", {"rows": torch.tensor([-1, 1, 2, 3, 4, 5])}, "rows: got -1 … 5"),
        ("info_nce", {"groups": torch.zeros(6)}, "groups"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any], named: str) -> None:
    call, arguments = CALLS[name]
    with pytest.raises(ArgumentError, match=named):
        call(**{**arguments, **change})
