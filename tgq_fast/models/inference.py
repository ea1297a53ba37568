"""Faster connectors for inference on the CPU: weights in the layout that the processor multiplies.

With an AMX matrix unit (:mod:`tgq_fast.ops.matrix_unit`) whole layers run there: query, key and value as one
product, attention over packed metadata, the absorbed cross-attention, feed-forwards with activation, residual and
LayerNorm in the products. Elsewhere linear layers keep the matrix library's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tgq_fast.models.attention import (
    Guide,
    HybridCrossAttention,
    ResidualOutput,
    StreamSelfAttention,
    TextPacking,
)
from tgq_fast.models.layers import Intermediate, QueryLayer
from tgq_fast.ops.cross_attention_torch import absorbs, items_at_once
from tgq_fast.ops.matrix_unit import PackedLinear, shared_attention, stream_attention, why_not

__all__ = ["packed_weights"]

# Rows multiplied at a time. oneDNN's bf16 product of many rows is slower than the same rows in parts.
_ROWS = 256


@contextmanager
def packed_weights(module: nn.Module) -> Iterator[None]:
    """While open, the layers in `module` that are on the CPU work with a repacked copy of their weights.

    A plain product brings the weights into the layout that the matrix unit reads, each time. Here that happens once,
    and what surrounds the products happens as their results are written. For calls without autograd, outside of
    `torch.compile` and in the weights' dtype; all others take the weights as they are. Weights must not change while
    it is open. Costs a second copy of them, half as large again in fp32 with a matrix unit.

    Values are those of the plain layers up to rounding, which is no larger. Does nothing for dtypes other than fp32 and
    bf16, and where PyTorch has no oneDNN.
    """
    changed: list[tuple[nn.Module, str]] = []
    done: set[nn.Module] = set()  # modules that their owner's replacement covers
    try:
        for child in module.modules():  # owners before what they own
            if child in done:
                continue
            found = _replacement(child)
            if found is None or found[0] in vars(child):
                continue
            name, replacement, covered = found
            child.__dict__[name] = replacement
            changed.append((child, name))
            done.update(covered)
        yield
    finally:
        for child, name in changed:
            child.__dict__.pop(name, None)


_Replacement = tuple[str, Callable[..., Any], list[nn.Module]]


def _replacement(owner: nn.Module) -> _Replacement | None:
    """Method, what replaces it, and the modules inside that it covers."""
    weight = next((p for p in owner.parameters()), None)
    if weight is None or weight.device.type != "cpu":
        return None
    if not why_not(weight.dtype):
        return _on_matrix_unit(owner)
    if torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, torch.bfloat16):
        return _in_onednn(owner)
    return None


def _applies(weight: Tensor, *tensors: Tensor) -> bool:
    """Whether a call may use the packed copy."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(x.dtype == weight.dtype and x.device.type == "cpu" and x.numel() for x in tensors)


# ---- with a matrix unit --------------------------------------------------------------------------------------------


def _on_matrix_unit(owner: nn.Module) -> _Replacement | None:
    match owner:
        case QueryLayer() if _exact_gelu(owner.intermediate_query) and _norms_after(owner.output_query):
            fused = _FeedForwards(owner)
            return "feed_forward", fused, fused.covered
        case StreamSelfAttention() if _SelfAttention.fits(owner):
            p = owner.attention
            return "forward", _SelfAttention(owner), [p.query, p.key, p.value]
        case HybridCrossAttention() if _CrossAttention.fits(owner):
            p = owner.attention
            return "context", _CrossAttention(owner), [p.query, p.key, p.value]
        case ResidualOutput() if _norms_after(owner):
            norm = cast(nn.LayerNorm, owner.LayerNorm)
            packed = PackedLinear(owner.dense.weight, owner.dense.bias, norm)
            return "forward", partial(_residual_output, owner, packed), [owner.dense]
        case nn.Linear() if type(owner) is nn.Linear:
            return "forward", partial(_linear, owner, PackedLinear(owner.weight, owner.bias)), []
    return None


def _norms_after(owner: ResidualOutput) -> bool:
    """Whether a LayerNorm follows the residual sum, which the product then does on its way out."""
    return isinstance(owner.LayerNorm, nn.LayerNorm)


def _exact_gelu(owner: Intermediate) -> bool:
    return type(owner.activation) is type(ACT2FN["gelu"])


def _linear(owner: nn.Linear, packed: PackedLinear, x: Tensor) -> Tensor:
    return packed(x) if _applies(owner.weight, x) else type(owner).forward(owner, x)


def _residual_output(owner: ResidualOutput, packed: PackedLinear, x: Tensor, residual: Tensor) -> Tensor:
    if not _applies(owner.dense.weight, x, residual) or (owner.training and owner.dropout.p):
        return type(owner).forward(owner, x, residual)
    return packed.add_to(x, residual)


class _FeedForwards:
    """`QueryLayer.feed_forward` with both halves in one call."""

    def __init__(self, owner: QueryLayer) -> None:
        self.owner = owner
        pairs = [
            (getattr(owner, f"intermediate{name}"), getattr(owner, f"output{name}"))
            for name in ("_query", "_explore", "")
            if hasattr(owner, f"intermediate{name}")
        ]
        self.packed = {
            first: (
                PackedLinear(first.dense.weight, first.dense.bias),
                PackedLinear(second.dense.weight, second.dense.bias, cast(nn.LayerNorm, second.LayerNorm)),
            )
            for first, second in pairs
        }
        self.covered = [m for first, second in pairs for m in (first, first.dense, second, second.dense)]

    def __call__(self, intermediate: Intermediate, output: ResidualOutput, x: Tensor) -> Tensor:
        if not _applies(output.dense.weight, x) or (output.training and output.dropout.p):
            return type(self.owner).feed_forward(self.owner, intermediate, output, x)
        up, down = self.packed[intermediate]
        return up.feed_forward(down, x)


class _SelfAttention:
    """`StreamSelfAttention.forward` with one product for queries, keys and values, over packed text rows."""

    def __init__(self, owner: StreamSelfAttention) -> None:
        self.owner = owner
        p = owner.attention
        weights = (p.query.weight, p.key.weight, p.value.weight)
        biases = (p.query.bias, torch.zeros_like(p.query.bias), p.value.bias)  # keys have none
        with torch.no_grad():
            self.projections = PackedLinear(torch.cat(weights), torch.cat(biases))

    @staticmethod
    def fits(owner: StreamSelfAttention) -> bool:
        width = owner.attention.query.weight.shape[0]
        return width // owner.attention.num_heads % 16 == 0 and width % 32 == 0

    def __call__(
        self,
        queries: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        *,
        text_wanted: bool,
        packing: TextPacking | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        owner, p = self.owner, self.owner.attention
        hidden = text is not None and packing is None and text_mask is not None and not bool(text_mask.all())
        if hidden or not _applies(p.query.weight, queries):
            return type(owner).forward(owner, queries, text, text_mask, text_wanted=text_wanted, packing=packing)
        rows = starts = None
        if text is not None and text.numel():
            starts = packing.starts if packing is not None else torch.arange(text.shape[0] + 1) * text.shape[1]
            width = queries.shape[-1]
            columns = None if text_wanted else slice(width, 3 * width)
            rows = self.projections(owner.norm(text).reshape(-1, width), columns=columns)
        layout = owner.layout
        context, text_context = stream_attention(
            self.projections(owner.norm(queries)),
            rows,
            starts,
            (layout.num_anchored, queries.shape[1] - layout.num_anchored),
            p.num_heads,
            mixing=layout.mixing,
            explore_sees_text=layout.explore_sees_text,
            text_wanted=text_wanted,
        )
        updated = owner.output(context, queries)
        if text is None or not text_wanted:
            return updated, None
        return updated, text if text_context is None else owner.output(text_context.view_as(text), text)


class _CrossAttention:
    """`HybridCrossAttention.context` in the absorbed form, or with packed projections where that costs less."""

    def __init__(self, owner: HybridCrossAttention) -> None:
        self.owner = owner
        p = owner.attention
        self.query = PackedLinear(p.query.weight, p.query.bias)
        keys, values = (w.detach().unflatten(0, (p.num_heads, -1)) for w in (p.key.weight, p.value.weight))
        self.absorb_keys = PackedLinear(keys.transpose(1, 2))  # q' = q_h Wk_h
        self.apply_values = PackedLinear(values, p.value.bias)

    @staticmethod
    def fits(owner: HybridCrossAttention) -> bool:
        width, source_width = owner.attention.key.weight.shape
        return width // owner.attention.num_heads % 32 == 0 and source_width % 32 == 0

    def __call__(
        self, anchored: Tensor, exploratory: Tensor, source: Tensor, key_mask: Tensor | None, guide: Guide | None = None
    ) -> Tensor:
        owner, p = self.owner, self.owner.attention
        queries = torch.cat((anchored, exploratory), dim=1)
        packed = guide is None and _applies(p.query.weight, queries, source)
        if not packed or not absorbs(queries, source, p.num_heads):
            return type(owner).context(owner, anchored, exploratory, source, key_mask, guide)
        source = source if source.stride(2) == 1 else source.contiguous()
        width, step = queries.shape[2], items_at_once(queries, source, p.num_heads)
        spans = [slice(i, i + step) for i in range(0, queries.shape[0], step)]
        masks = [None if key_mask is None else key_mask[span] for span in spans]
        parts = [self._absorbed(queries[s], source[s], mask) for s, mask in zip(spans, masks, strict=True)]
        context = parts[0] if len(parts) == 1 else torch.cat(parts)
        if key_mask is not None and p.value.bias is not None:  # nothing visible: no value either
            context = context * key_mask.any(dim=1)[:, None, None]
        return context.view(*queries.shape[:2], width)

    def _absorbed(self, queries: Tensor, source: Tensor, key_mask: Tensor | None) -> Tensor:
        heads, (batch, rows, width) = self.owner.attention.num_heads, queries.shape
        absorbed = self.absorb_keys(self.query(queries)).view(batch, rows * heads, source.shape[2])
        pooled = shared_attention(absorbed, source, key_mask, (width // heads) ** -0.5)
        return self.apply_values(pooled.view(batch, rows, -1))


# ---- without ---------------------------------------------------------------------------------------------------------


def _in_onednn(owner: nn.Module) -> _Replacement | None:
    """Source: what TorchInductor's freezing does to a compiled graph, for eager modules."""
    if isinstance(owner, Intermediate) and _exact_gelu(owner):
        return "forward", partial(_onednn_forward, owner, owner.dense, _reordered(owner.dense), "gelu"), [owner.dense]
    if type(owner) is nn.Linear:
        return "forward", partial(_onednn_forward, owner, owner, _reordered(owner), "none"), []
    return None


def _reordered(layer: nn.Linear) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)


def _onednn_forward(owner: Any, layer: nn.Linear, packed: Tensor, activation: str, x: Tensor) -> Tensor:
    if not _applies(layer.weight, x):
        return type(owner).forward(owner, x)
    variant = "none" if activation == "gelu" else ""  # the exact error function, not its approximation
    parts = [
        torch.ops.mkldnn._linear_pointwise(part, packed, layer.bias, activation, [], variant)
        for part in x.reshape(-1, x.shape[-1]).split(_ROWS)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.unflatten(0, x.shape[:-1])
