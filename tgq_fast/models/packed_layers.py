"""Layers with packed weights, each a twin of the plain layer it derives from, whose parameters it shares.

With an AMX matrix unit (:mod:`tgq_fast.ops.matrix_unit`) whole layers run there: query, key and value as one
product, attention over packed metadata, the absorbed cross-attention, feed-forwards with activation, residual and
LayerNorm in the products. Elsewhere linear layers keep the matrix library's own layout. A call that a layer cannot
take runs its plain forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tgq_fast.models.attention import (
    AttentionProjections,
    Guide,
    HybridCrossAttention,
    ResidualOutput,
    StreamSelfAttention,
    TextPacking,
)
from tgq_fast.models.layers import Intermediate, QueryLayer
from tgq_fast.ops.cross_attention_torch import absorbs, items_at_once
from tgq_fast.ops.dispatch import Decision, decide_packed, requested_backend
from tgq_fast.ops.matrix_unit import PackedLinear, shared_attention, stream_attention
from tgq_fast.ops.plain import why_not_as_made, why_not_plain

__all__ = ["IN_ONEDNN", "ON_MATRIX_UNIT", "PackedLayer", "shallow"]

# Rows multiplied at a time. oneDNN's bf16 product of many rows is slower than the same rows in parts.
_ROWS = 256


def shallow(module: nn.Module, children: dict[str, nn.Module | None], kind: type | None = None) -> Any:
    """A module that shares everything with `module` but its children, and its class where `kind` is given."""
    cls: Any = type(module) if kind is None else kind
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__, _modules=children)
    return twin


class PackedLayer(nn.Module):
    """What packed layers share; derived classes derive from the plain layer, too.

    Attributes:
        operator: what :class:`Decision` calls it.
        elsewhere: why the weights are not packed for the matrix unit; empty where they are.
        covered: children whose weights are packed with the layer's own, and which stay plain in it.
    """

    operator: ClassVar[str]
    elsewhere: ClassVar[str] = ""
    covered: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def twin_of(cls, plain: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> PackedLayer:
        """The packed twin of `plain`, `convert` making those of the children that the layer does not cover."""
        children = {
            name: child if child is None or name in cls.covered else convert(child)
            for name, child in plain._modules.items()
        }
        twin: PackedLayer = shallow(plain, children, cls)
        with torch.no_grad():
            twin.pack()
        return twin

    @classmethod
    def packs_all_of(cls, plain: nn.Module) -> bool:
        """Whether nothing of the layer is lost: parts that it covers are not called, so they must be as made."""
        parts = [part for name in cls.covered if (part := plain._modules.get(name)) is not None]
        return cls.fits(plain) and not any(why_not_as_made(part, _PARTS) for part in parts)

    @classmethod
    def fits(cls, plain: Any) -> bool:
        """Whether a layer's shapes and parts can be packed."""
        return True

    def pack(self) -> None:
        """Pack the weights as they are now."""
        raise NotImplementedError

    def decision(self, weight: Tensor, *tensors: Tensor, more: Sequence[str] = ()) -> Decision:
        """Whether a call over `tensors` runs on the packed copy of `weight`; `more`: reasons of the layer's own.

        Raises:
            BackendError: "cpp" is asked for by name and cannot run.
        """
        reasons = list(more)
        if torch.compiler.is_compiling():
            reasons.append("torch.compile sees the plain layer")
        elif torch.is_grad_enabled():
            reasons.append("autograd is recording: packed weights are for inference")
        for x in tensors:
            if x.dtype != weight.dtype or x.device.type != "cpu":
                reasons.append(f"{x.dtype} on {x.device.type} meets weights packed as {weight.dtype} on the CPU")
            elif not x.numel():
                reasons.append("there is nothing to compute")
        return decide_packed(self.operator, reasons, self.elsewhere)


def _dropout(layer: ResidualOutput) -> list[str]:
    return ["it drops out values"] if layer.training and layer.dropout.p else []


def _exact_gelu(layer: Intermediate) -> bool:
    return type(layer.activation) is type(ACT2FN["gelu"])


def _norm(layer: ResidualOutput) -> nn.LayerNorm | None:
    return layer.LayerNorm if isinstance(layer.LayerNorm, nn.LayerNorm) else None


def _scales_and_shifts(layer: ResidualOutput) -> bool:
    """Whether the LayerNorm, where there is one, is the one that is packed."""
    norm = _norm(layer)
    return norm is None or (norm.weight is not None and norm.bias is not None)


_PARTS = (AttentionProjections, Intermediate, ResidualOutput, nn.Dropout, nn.Identity, type(ACT2FN["gelu"]))


class PackedDense(PackedLayer, nn.Linear):
    operator = "linear"
    packs = nn.Linear

    @classmethod
    def fits(cls, plain: nn.Linear) -> bool:
        return not why_not_plain(layer=plain)

    def pack(self) -> None:
        self.packed = PackedLinear(self.weight, self.bias)

    def decide(self, x: Tensor) -> Decision:
        return self.decision(self.weight, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x) if self.decide(x).packed else super().forward(x)


class PackedResidual(PackedLayer, ResidualOutput):
    """Product, residual sum and, after BERT, LayerNorm in one call."""

    operator = "residual_output"
    covered = ("dense", "LayerNorm", "dropout")

    @classmethod
    def fits(cls, plain: ResidualOutput) -> bool:
        return _scales_and_shifts(plain) and not why_not_plain(dense=plain.dense)

    def pack(self) -> None:
        self.packed = PackedLinear(self.dense.weight, self.dense.bias, _norm(self))

    def decide(self, x: Tensor, residual: Tensor) -> Decision:
        return self.decision(self.dense.weight, x, residual, more=_dropout(self))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if not self.decide(x, residual).packed:
            return super().forward(x, residual)
        return self.packed.add_to(x, residual)


class PackedQueryLayer(PackedLayer, QueryLayer):
    """Both halves of every feed-forward in one call."""

    operator = "feed_forward"
    covered = tuple(f"{half}{name}" for half in ("intermediate", "output") for name in ("_query", "_explore", ""))

    @classmethod
    def _pairs(cls, layer: QueryLayer) -> list[tuple[Intermediate, ResidualOutput]]:
        names = [name for name in ("_query", "_explore", "") if hasattr(layer, f"intermediate{name}")]
        return [(getattr(layer, f"intermediate{name}"), getattr(layer, f"output{name}")) for name in names]

    @classmethod
    def fits(cls, plain: QueryLayer) -> bool:
        return all(
            _exact_gelu(up) and _scales_and_shifts(down) and not why_not_plain(first=up.dense, second=down.dense)
            for up, down in cls._pairs(plain)
        )

    def pack(self) -> None:
        self.packed = {
            up: (
                PackedLinear(up.dense.weight, up.dense.bias),
                PackedLinear(down.dense.weight, down.dense.bias, _norm(down)),
            )
            for up, down in self._pairs(self)
        }

    def feed_forward(self, intermediate: Intermediate, output: ResidualOutput, x: Tensor) -> Tensor:
        if not self.decision(output.dense.weight, x, more=_dropout(output)).packed:
            return super().feed_forward(intermediate, output, x)
        up, down = self.packed[intermediate]
        return up.feed_forward(down, self.norm_feed_forward(x), x)


class PackedSelfAttention(PackedLayer, StreamSelfAttention):
    """One product for queries, keys and values, over packed text rows."""

    operator = "stream_self_attention"
    covered = ("attention",)

    @classmethod
    def fits(cls, plain: StreamSelfAttention) -> bool:
        p, width = plain.attention, plain.attention.query.out_features
        shapes = width // p.num_heads % 16 == 0 and width % 32 == 0
        return shapes and not why_not_plain(query=p.query, key=p.key, value=p.value)

    def pack(self) -> None:
        p = self.attention
        weights = (p.query.weight, p.key.weight, p.value.weight)
        biases = (p.query.bias, torch.zeros_like(p.query.bias), p.value.bias)  # keys have none
        self.projections = PackedLinear(torch.cat(weights), torch.cat(biases))

    def decide(
        self,
        queries: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        *,
        text_wanted: bool,
        packing: TextPacking | None = None,
    ) -> Decision:
        padded = text is not None and packing is None and text_mask is not None
        hidden = ["padded metadata was not packed"] if padded and not bool(cast(Tensor, text_mask).all()) else []
        return self.decision(self.attention.query.weight, queries, more=hidden)

    def forward(
        self,
        queries: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        *,
        text_wanted: bool,
        packing: TextPacking | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.decide(queries, text, text_mask, text_wanted=text_wanted, packing=packing).packed:
            return super().forward(queries, text, text_mask, text_wanted=text_wanted, packing=packing)
        rows = starts = None
        if text is not None and text.numel():
            evenly = torch.arange(len(text) + 1, device="cpu") * text.shape[1]
            starts = evenly if packing is None else packing.starts
            width = queries.shape[-1]
            columns = None if text_wanted else slice(width, 3 * width)
            rows = self.projections(self.norm(text).reshape(-1, width), columns=columns)
        layout = self.layout
        context, text_context = stream_attention(
            self.projections(self.norm(queries)),
            rows,
            starts,
            (layout.num_anchored, queries.shape[1] - layout.num_anchored),
            self.attention.num_heads,
            mixing=layout.mixing,
            explore_sees_text=layout.explore_sees_text,
            text_wanted=text_wanted,
        )
        updated = self.output(context, queries)
        if text is None or not text_wanted:
            return updated, None
        return updated, text if text_context is None else self.output(text_context.view_as(text), text)


class PackedCrossAttention(PackedLayer, HybridCrossAttention):
    """The absorbed form, or the plain layer where projections cost less."""

    operator = "hybrid_cross_attention"
    covered = ("attention",)

    @classmethod
    def fits(cls, plain: HybridCrossAttention) -> bool:
        p = plain.attention
        width, source_width = p.key.out_features, p.key.in_features
        shapes = width // p.num_heads % 32 == 0 and source_width % 32 == 0
        return shapes and not why_not_plain(query=p.query, key=p.key, value=p.value)

    def pack(self) -> None:
        p = self.attention
        self.query = PackedLinear(p.query.weight, p.query.bias)
        keys, values = (w.detach().unflatten(0, (p.num_heads, -1)) for w in (p.key.weight, p.value.weight))
        self.absorb_keys = PackedLinear(keys.transpose(1, 2))  # q' = q_h Wk_h
        self.apply_values = PackedLinear(values, p.value.bias)

    def _decide(self, queries: Tensor, source: Tensor) -> Decision:
        more = []
        if not source.shape[1]:
            more = ["there is no visual token"]
        elif requested_backend(None) != "cpp" and not absorbs(queries, source, self.attention.num_heads):
            more = ["the projected form costs less"]
        return self.decision(self.attention.query.weight, queries, source, more=more)

    def decide(
        self,
        queries: Tensor,
        num_anchored: int,
        source: Tensor,
        key_mask: Tensor | None = None,
        guide: Guide | None = None,
    ) -> Decision:
        return self._decide(queries, source)

    def context(
        self,
        anchored: Tensor,
        exploratory: Tensor,
        source: Tensor,
        key_mask: Tensor | None,
        guide: Guide | None = None,
        affine: nn.LayerNorm | None = None,
    ) -> Tensor:
        queries = torch.cat((anchored, exploratory), dim=1)
        if affine is not None or not self._decide(queries, source).packed:
            return super().context(anchored, exploratory, source, key_mask, guide, affine)
        source = source if source.stride(2) == 1 else source.contiguous()
        heads, width = self.attention.num_heads, queries.shape[2]
        step = items_at_once(queries, source, heads)
        agreement, strength = (None, None) if guide is None else (guide.agreement, guide.scale.flatten())  # [Na * H]
        parts = []
        for first in range(0, queries.shape[0], step):
            items = slice(first, first + step)
            absorbed = self.absorb_keys(self.query(queries[items])).view(-1, queries.shape[1] * heads, source.shape[2])
            mask, steer = (None if t is None else t[items] for t in (key_mask, agreement))
            scale = (width // heads) ** -0.5
            pooled = shared_attention(absorbed, source[items], mask, scale, steer, strength)
            parts.append(self.apply_values(pooled.view(-1, queries.shape[1], heads * source.shape[2])))
        context = parts[0] if len(parts) == 1 else torch.cat(parts)
        if key_mask is not None and self.attention.value.bias is not None:  # nothing visible: no value either
            context = context * key_mask.any(dim=1)[:, None, None]
        return context


class _OneDNN(PackedLayer):
    """A linear layer in the layout of PyTorch's matrix library, with what follows it.

    The backend stays "torch", whose library it is.

    Source: what TorchInductor's freezing does to a compiled graph, for eager modules.
    """

    elsewhere = "the processor (or TGQ_ISA) has no AMX matrix unit"

    def reorder(self, layer: nn.Linear) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)

    def multiply(self, layer: nn.Linear, x: Tensor, activation: str) -> Tensor:
        variant = "none" if activation == "gelu" else ""  # the exact error function, not its approximation
        parts = [
            torch.ops.mkldnn._linear_pointwise(part, self.packed, layer.bias, activation, [], variant)
            for part in x.reshape(-1, x.shape[-1]).split(_ROWS)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.unflatten(0, x.shape[:-1])


class OneDNNDense(_OneDNN, nn.Linear):
    operator = "linear"
    packs = nn.Linear

    @classmethod
    def fits(cls, plain: nn.Linear) -> bool:
        return not why_not_plain(layer=plain)

    def pack(self) -> None:
        self.reorder(self)

    def decide(self, x: Tensor) -> Decision:
        return self.decision(self.weight, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self, x, "none") if self.decide(x).packed else super().forward(x)


class OneDNNIntermediate(_OneDNN, Intermediate):
    operator = "intermediate"
    covered = ("dense", "activation")

    @classmethod
    def fits(cls, plain: Intermediate) -> bool:
        return _exact_gelu(plain) and not why_not_plain(dense=plain.dense)

    def pack(self) -> None:
        self.reorder(self.dense)

    def decide(self, x: Tensor) -> Decision:
        return self.decision(self.dense.weight, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.dense, x, "gelu") if self.decide(x).packed else super().forward(x)


ON_MATRIX_UNIT: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedDense,
    ResidualOutput: PackedResidual,
    QueryLayer: PackedQueryLayer,
    StreamSelfAttention: PackedSelfAttention,
    HybridCrossAttention: PackedCrossAttention,
}
IN_ONEDNN: dict[type[nn.Module], type[PackedLayer]] = {nn.Linear: OneDNNDense, Intermediate: OneDNNIntermediate}
