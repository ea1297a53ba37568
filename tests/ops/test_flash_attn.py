"""The flash-attn backend, against a stand-in with flash-attn's documented signature, layout and demands."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
from op_checks import DEVICE, check_cross
from torch import Tensor

from tgq_fast import ops
from tgq_fast.errors import BackendError
from tgq_fast.ops import cross_attention

calls: list[tuple[int, ...]] = []


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """[B, S, H, D] over [B, L, H, D] → [B, S, H, D] in one 16-bit dtype; last dimensions have stride 1."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    assert q.shape[3] <= 256 and all(t.stride(-1) == 1 for t in (q, k, v))
    calls.append(tuple(q.shape))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
    )
    return out.transpose(1, 2)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn is installed and takes the tensors of this machine's tests."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    reasons = cross_attention._flash_attn_reasons
    monkeypatch.setattr(
        cross_attention,
        "_flash_attn_reasons",
        lambda *a: [why for why in reasons(*a) if not why.startswith("tensors are on")],
    )
    calls.clear()


@pytest.mark.parametrize(
    "sizes", [(2, 3, 4, 37, 24, 32, 2), (1, 1, 0, 1, 16, 16, 1), (0, 2, 3, 5, 16, 16, 2)], ids=["odd", "L=1", "B=0"]
)
@pytest.mark.parametrize("strided", [False, True])
def test_parity_forward_and_gradients(
    flash_attn: None, sizes: tuple[int, int, int, int, int, int, int], strided: bool
) -> None:
    check_cross("projected", torch.float16, sizes=sizes, strided=strided, stats=False, backend="flash_attn")
    assert calls[0] == (sizes[0], sizes[1] + sizes[2], sizes[6], sizes[5] // sizes[6])


def arguments(dtype: torch.dtype = torch.float16, head: int = 8) -> tuple[Tensor | None, ...]:
    d = 2 * head
    weights = [torch.randn(d, n, dtype=dtype) for n in (d, 12, 12)]
    a, x = torch.randn(2, 4, d, dtype=dtype), torch.randn(2, 9, 12, dtype=dtype)
    given = a, a[:, :1], x, weights[0], None, weights[1], None, weights[2], None
    return tuple(None if t is None else t.to(DEVICE) for t in given)


def test_asked_for_by_name_it_takes_the_projected_form(flash_attn: None) -> None:
    decision = ops.explain(ops.hybrid_cross_attention, *arguments(), num_heads=2, backend="flash_attn")
    assert (decision.backend, decision.form) == ("flash_attn", "projected")
    with ops.use_backend("flash_attn"):
        ops.hybrid_cross_attention(*arguments(), num_heads=2)
    assert len(calls) == 1


def test_autocast_lends_it_a_lower_dtype(flash_attn: None) -> None:
    with torch.autocast(DEVICE, torch.float16):
        call = cross_attention._Call(*arguments(torch.float32), num_heads=2)  # type: ignore[arg-type]
        reasons = cross_attention._flash_attn_reasons(call, "projected")
    assert bool(reasons) == (DEVICE == "cpu")  # flash-attn is a matter of CUDA's autocast alone


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head": 264}, "heads of width 264"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, "key mask"),
        ({"return_stats": True}, "statistics"),
        ({"form": "absorbed"}, "absorbed"),
        ({"form": "fused"}, "absorbed"),
    ],
)
def test_what_it_refuses(flash_attn: None, change: dict, reason: str) -> None:
    tensors = arguments(**{name: change.pop(name) for name in ("dtype", "head") if name in change})
    options = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(BackendError) as caught:
        ops.hybrid_cross_attention(*tensors, num_heads=2, backend="flash_attn", **options)
    assert [why for why in caught.value.reasons["flash_attn"] if reason in why]
    assert not calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_needs_a_cuda_device() -> None:
    with pytest.raises(BackendError, match="not on a CUDA device"):
        ops.hybrid_cross_attention(*arguments(), num_heads=2, backend="flash_attn")
