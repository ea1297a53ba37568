"""Hybrid-query cross-attention: both query streams over shared visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from tgq_fast.errors import ArgumentError
from tgq_fast.ops.checks import check_heads, check_mask, check_shape, check_tensors
from tgq_fast.ops.cross_attention_cost import form_cost
from tgq_fast.ops.cross_attention_torch import Context, Keys, absorbed, projected
from tgq_fast.ops.cross_attention_triton import absorbed_attention
from tgq_fast.ops.dispatch import (
    PACKED_ONLY,
    Decision,
    choose,
    explainer,
    flash_attn_importable,
    multiprocessors,
    requested_backend,
    triton_reasons,
    wants_grad,
)
from tgq_fast.ops.stream_attention_triton import stream_attention
from tgq_fast.reference.cross_attention import AttentionStats, HybridAttentionOutput, check_guide

__all__ = ["Form", "hybrid_cross_attention"]

Form = Literal["auto", "projected", "absorbed", "fused"]

_OP = "hybrid_cross_attention"
MAX_HEAD = 256


def head_reasons(head: int, dtype: torch.dtype) -> list[str]:
    """Why the per-head kernels cannot take heads of this width (registers: half the width in fp32)."""
    limit = 128 if dtype == torch.float32 else MAX_HEAD
    return [f"heads of width {head} exceed {limit} for {dtype}"] if head > limit else []


def hybrid_cross_attention(
    anchored: Tensor,
    exploratory: Tensor,
    visual: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    *,
    num_heads: int,
    key_mask: Tensor | None = None,
    key_group: Tensor | None = None,
    guide: Tensor | None = None,
    guide_scale: Tensor | None = None,
    return_stats: bool = False,
    form: Form = "auto",
    keys_values: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> HybridAttentionOutput:
    """Both query streams attend to the same visual tokens with shared projections.

    Arguments and result are those of :func:`tgq_fast.reference.hybrid_cross_attention`; in addition:

    Args:
        form: "projected"; "absorbed"; "fused", the absorbed form in one kernel, its products with the key and value
            weights included (triton only); or "auto": the model of :mod:`tgq_fast.ops.cross_attention_cost` decides
            between the first two, and that of :mod:`tgq_fast.kernels.cross_attention_fusion` whether the second
            runs fused.
        keys_values: [B, L, d] keys and values that were projected already; implies the
            projected form. `k_weight` and `v_weight` are then not used and may be None; `v_bias` is still added.
        q_weight: None with `keys_values` means that the queries were projected, too.
        backend: "auto", "triton", "flash_attn" or "torch"; None: the one in force, see :mod:`tgq_fast.ops.dispatch`.

    Raises:
        ArgumentError: shapes that do not fit, or an unknown form or backend.
        BackendError: a backend that was asked for by name cannot run this call.
    """
    call = _Call(
        anchored, exploratory, visual, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads,
        key_mask, key_group, guide, guide_scale, return_stats, form, keys_values, backend,
    )  # fmt: skip
    decision = _decide(call)
    weights: Any = (k_weight, v_weight)  # both there where they are used: _decide has checked
    num_anchored, head = anchored.shape[1], call.head
    queries = torch.cat((anchored, exploratory), dim=1)  # [B, N, d]
    q = queries if q_weight is None else linear(queries, q_weight, q_bias)
    if k_bias is not None and wants_grad(k_bias):
        q = q + 0 * k_bias.sum()  # a gradient of zero instead of none, for whoever waits for one
    q = q.unflatten(-1, (num_heads, head))  # [B, N, H, dh]
    keys = Keys(key_mask, key_group, None, None)
    if guide is not None and num_anchored:
        keys = Keys(key_mask, key_group, guide.detach(), guide_scale)
    if decision.form != "projected":
        run: Callable[..., Context] = absorbed
        if decision.backend == "triton":
            fused, inside = decision.form == "fused", None
            # With gradients the bias stays outside: see absorbed_attention.
            if fused and not wants_grad(q, visual, k_weight, v_weight, v_bias, guide_scale):
                inside, v_bias = v_bias, None
            run = partial(_absorbed_triton, fused=fused, v_bias=inside)
        context, stats = run(q, visual, *weights, keys, return_stats)
    else:
        k, v = keys_values or (linear(visual, weight) for weight in weights)
        k, v = (x.unflatten(-1, (num_heads, head)) for x in (k, v))  # [B, L, H, dh]
        context, stats = _PROJECTED[decision.backend](q, k, v, keys, return_stats)
    if v_bias is not None:  # the weights of a row sum to one, or to zero when no key is visible
        bias = v_bias.to(context.dtype)
        if key_mask is not None:
            bias = bias * key_mask.any(dim=1)[:, None, None]
        elif not visual.shape[1]:
            bias = bias * 0
        context = context + bias
    return HybridAttentionOutput(context[:, :num_anchored], context[:, num_anchored:], stats)


class _Call(NamedTuple):
    """The arguments of one call, with the operator's names and defaults, and what follows from their shapes."""

    anchored: Tensor
    exploratory: Tensor
    visual: Tensor
    q_weight: Tensor | None
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    v_weight: Tensor | None
    v_bias: Tensor | None
    num_heads: int
    key_mask: Tensor | None = None
    key_group: Tensor | None = None
    guide: Tensor | None = None
    guide_scale: Tensor | None = None
    return_stats: bool = False
    form: str = "auto"
    keys_values: tuple[Tensor, Tensor] | None = None
    backend: str | None = None

    @property
    def queries(self) -> int:
        """N, of both streams."""
        return self.anchored.shape[1] + self.exploratory.shape[1]

    @property
    def head(self) -> int:
        """dh."""
        return self.anchored.shape[2] // self.num_heads

    def check(self) -> None:
        """ArgumentError for what is no call of the operator."""
        anchored, exploratory, visual = self.anchored, self.exploratory, self.visual
        check_tensors(3, anchored=anchored, exploratory=exploratory, visual=visual)
        if anchored.shape[2] != exploratory.shape[2] or not (
            anchored.shape[0] == exploratory.shape[0] == visual.shape[0]
        ):
            shapes = tuple(tuple(x.shape) for x in (anchored, exploratory, visual))
            raise ArgumentError(
                "anchored, exploratory, visual", shapes, "one batch size, and one width for both streams"
            )
        batch, length, visual_width = visual.shape
        width = anchored.shape[2]
        check_heads(self.num_heads, width)
        if not isinstance(self.form, str) or self.form not in get_args(Form):
            raise ArgumentError("form", repr(self.form), "one of " + ", ".join(map(repr, get_args(Form))))
        if self.keys_values is None:
            for name, weight in (("q_weight", self.q_weight), ("k_weight", self.k_weight), ("v_weight", self.v_weight)):
                if weight is None:
                    raise ArgumentError(name, None, "a weight, unless keys and values are given")
            check_shape("k_weight", self.k_weight, width, visual_width)
            check_shape("v_weight", self.v_weight, width, visual_width)
        elif not isinstance(self.keys_values, tuple) or len(self.keys_values) != 2:
            raise ArgumentError("keys_values", f"a {type(self.keys_values).__name__}", "None or a pair (keys, values)")
        else:
            for projection in self.keys_values:
                check_shape("keys_values", projection, batch, length, width)
        check_shape("q_weight", self.q_weight, width, width)
        for name, bias in (("q_bias", self.q_bias), ("k_bias", self.k_bias), ("v_bias", self.v_bias)):
            check_shape(name, bias, width)
        check_mask("key_mask", self.key_mask, batch, length)
        check_mask("key_group", self.key_group, batch, length)
        check_guide(self.guide, self.guide_scale, (batch, length), (anchored.shape[1], self.num_heads))


def _decide(call: _Call) -> Decision:
    call.check()
    form: str = call.form
    notes: tuple[str, ...] = ("form asked for by the caller",)
    requested = requested_backend(call.backend)
    if call.keys_values is not None:
        if form in ("absorbed", "fused"):
            raise ArgumentError("form", repr(form), "'auto' or 'projected' when keys and values are given")
        form, notes = "projected", ("keys and values were given",)
    elif form == "auto" and requested == "flash_attn":
        form, notes = "projected", ("the only form of flash_attn",)
    elif form == "auto":
        cost = form_cost(
            queries=call.queries,
            length=call.visual.shape[1],
            visual_width=call.visual.shape[2],
            width=call.anchored.shape[2],
            num_heads=call.num_heads,
            device=call.visual.device.type,
            dtype=call.anchored.dtype,
            grad_queries=wants_grad(call.anchored, call.exploratory, call.q_weight, call.guide_scale),
            grad_weights=wants_grad(call.k_weight, call.v_weight),
            grad_visual=wants_grad(call.visual),
        )
        form = cost.best
        notes = ("form by the cost model",) if torch.compiler.is_compiling() else (f"form by the cost model: {cost}",)
    tensors = (call.anchored, call.exploratory, call.visual, call.q_weight, call.k_weight, call.v_weight)
    about_keys = (call.key_mask, call.key_group, call.guide, call.guide_scale)
    reasons = triton_reasons(*tensors, *about_keys, forced=requested != "auto")
    if form != "absorbed":
        reasons += head_reasons(call.head, call.visual.dtype)
    candidates = {
        "triton": reasons,
        "flash_attn": _flash_attn_reasons(call, form),
        "torch": ["it has no fused form"] if form == "fused" else [],
    }
    requested, chosen, rejected = choose(_OP, call.backend, candidates)
    rejected = rejected | ({"cpp": PACKED_ONLY} if call.visual.device.type == "cpu" else {})
    open_form = call.form == "auto" and form == "absorbed"
    if open_form and chosen == "triton" and not head_reasons(call.head, call.visual.dtype):
        form, note = _fused(call)
        notes += note
    return Decision(_OP, requested, chosen, form, rejected, notes)


@explainer(_OP)
def _explain(*arguments: Any, **options: Any) -> Decision:
    return _decide(_Call(*arguments, **options))


def _fused(call: _Call) -> tuple[str, tuple[str, ...]]:
    """Whether an absorbed call runs as one launch, and the figures behind it."""
    from tgq_fast.kernels.cross_attention_fusion import fusion_cost

    processors, correction = multiprocessors(call.visual.device)
    if not processors:
        return "absorbed", ()
    cost = fusion_cost(
        batch=call.visual.shape[0],
        queries=call.queries,
        length=call.visual.shape[1],
        visual_width=call.visual.shape[2],
        num_heads=call.num_heads,
        head=call.head,
        item_size=call.anchored.element_size(),
        processors=processors,
        correction=correction,
    )
    return "fused" if cost.fuse else "absorbed", () if torch.compiler.is_compiling() else (str(cost),)


def _flash_attn_reasons(call: _Call, form: str) -> list[str]:
    visual, reasons = call.visual, []
    if not flash_attn_importable():
        reasons.append("flash-attn is not installed")
    if not visual.is_cuda:
        reasons.append(f"tensors are on {visual.device.type}, not on a CUDA device")
    if form != "projected":
        reasons.append("it has no absorbed form")
    if call.key_mask is not None:
        reasons.append("it takes no key mask")
    if call.guide is not None:
        reasons.append("it takes no guide")
    if call.return_stats:
        reasons.append("it returns no statistics")
    if call.head > MAX_HEAD:
        reasons.append(f"heads of width {call.head} exceed {MAX_HEAD}")
    autocast = torch.is_autocast_enabled("cuda")
    if not autocast and visual.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it does not compute in {visual.dtype}")
    return reasons


def _projected_triton(q: Tensor, k: Tensor, v: Tensor, keys: Keys, stats: bool) -> Context:
    k, v = k.to(q.dtype), v.to(q.dtype)
    group = keys.group if stats else None
    context, *found = stream_attention(
        q, k, v, keys.mask, group, keys.guide, _fp32(keys.guide_scale), (q.shape[1], 0, 0), "full", False, 0, stats
    )
    return context.flatten(2), _stats(found, group) if stats else None


def _projected_flash(q: Tensor, k: Tensor, v: Tensor, keys: Keys, stats: bool) -> Context:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k.to(q.dtype), v.to(q.dtype)).flatten(2), None


_PROJECTED = {"torch": projected, "triton": _projected_triton, "flash_attn": _projected_flash}


def _absorbed_triton(
    q: Tensor,
    visual: Tensor,
    wk: Tensor,
    wv: Tensor,
    keys: Keys,
    stats: bool,
    fused: bool,
    v_bias: Tensor | None,
) -> Context:
    dtype, heads = q.dtype, q.shape[2]
    group = keys.group if stats else None
    bias = None if v_bias is None else v_bias.to(dtype)
    context, *found = absorbed_attention(
        q.flatten(2),
        visual.to(dtype),
        wk.to(dtype),
        wv.to(dtype),
        bias,
        keys.mask,
        group,
        keys.guide,
        _fp32(keys.guide_scale),
        heads,
        stats,
        fused,
    )
    return context, _stats(found, group) if stats else None


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)


def _stats(found: list[Tensor], key_group: Tensor | None) -> AttentionStats:
    return AttentionStats(found[0], found[1], None if key_group is None else found[2])
