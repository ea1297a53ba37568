"""Inference on the CPU's matrix unit: linear layers with packed weights, and the connector's two attentions.

Forward only, for fp32 and bf16 on processors with AMX. fp32 products are sums of six products of bf16 parts, as
accurate as fp32 ones (docs/inference.md has the bound). Nothing here is an operator for autograd or `torch.compile`:
:func:`tgq_fast.models.inference.packed_weights` decides where it stands in for the operators.

Non-finite inputs give non-finite outputs, not always the same ones as PyTorch: an infinity times a part of a weight
that is zero is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.reference.stream_attention import Mixing

__all__ = ["PackedLinear", "shared_attention", "stream_attention", "why_not"]

_CODES = {torch.float32: 0, torch.bfloat16: 2}
_PANEL = 32  # output features are packed by so many
_STATUS = {1: "an argument was rejected", 2: "out of memory", 4: "TGQ_ISA forbids the matrix unit"}


def why_not(dtype: torch.dtype) -> str:
    """Why this machine cannot run these calls in `dtype`; empty when it can."""
    module = _native.extension()
    if module is None:
        return _native.why_missing()
    if not module.has_matrix_unit():
        return "the processor (or TGQ_ISA) has no AMX matrix unit"
    return "" if dtype in _CODES else f"it does not compute in {dtype}"


def _call(name: str, *args: object) -> None:
    module = _native.extension()
    assert module is not None  # a PackedLinear exists
    status = getattr(module, name)(*args)
    if status == 2:
        raise MemoryError(f"{name}: out of memory")
    if status:
        raise BackendError(name, "cpp", {"cpp": (_STATUS.get(status, f"status {status}"),)})


def _matrix(x: Tensor) -> tuple[int, int, int, int, int, int]:
    return (x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), 1, _CODES[x.dtype])


def _plain(x: Tensor) -> Tensor:
    """`x` with its values in memory: what torch keeps as a mark beside it, a negation or zeros, is carried out.

    Raises:
        ArgumentError: it is not on the CPU, where addresses mean something.
    """
    if x.device.type != "cpu":
        raise ArgumentError("tensor", f"one on {x.device}", "tensors on the CPU")
    return (x.clone() if x._is_zerotensor() else x).resolve_neg()


def _values(x: Tensor) -> Tensor:
    """`x` as its address promises it: contiguous, nothing lazy."""
    return _plain(x).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[..., n] → [M, n] whose rows are contiguous, copied only where strides forbid a view."""
    x = _plain(x.reshape(-1, x.shape[-1]))
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _copy(x: Tensor) -> Tensor:
    return _plain(x.detach()).to(torch.float32, copy=True).contiguous()


class PackedLinear:
    """One linear layer, or `groups` of equal shape side by side, with weights in the matrix unit's layout.

    Args:
        weight: [out, in], or [groups, out, in]: group g maps inputs g · in … (g + 1) · in to outputs g · out …; fp32 or
            bf16 on the CPU. Copied: later changes are not seen.
        bias: [groups · out] or None.
        norm: the LayerNorm after the residual sum of :meth:`add_to` and :meth:`feed_forward`, or None.

    Raises:
        BackendError: see :func:`why_not`.
        ArgumentError: several groups whose `out` is not a multiple of 32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, norm: nn.LayerNorm | None = None) -> None:
        if reason := why_not(weight.dtype):
            raise BackendError("PackedLinear", "cpp", {"cpp": (reason,)})
        weight = _plain(weight.detach())
        if weight.ndim == 2:
            weight = weight[None]
        if weight.shape[0] > 1 and weight.shape[1] % _PANEL:
            raise ArgumentError("weight", tuple(weight.shape), f"[groups, out, in] with out a multiple of {_PANEL}")
        if 1 not in weight.stride()[1:]:
            weight = weight.contiguous()
        self.dtype = weight.dtype
        self.groups, self.out_features, self.in_features = weight.shape
        self._shape = (*weight.shape, _CODES[weight.dtype])
        module = _native.extension()
        assert module is not None
        # Tiles are loaded whole cache lines at a time.
        size = module.packed_bytes(self._shape)
        self._memory = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
        skip = -self._memory.data_ptr() % 64
        self._packed = self._memory[skip : skip + size]
        addresses, threads = (weight.data_ptr(), *weight.stride(), self._packed.data_ptr()), torch.get_num_threads()
        _call("pack_weights", self._shape, *addresses, threads)
        features = self.groups * self.out_features
        self._bias = torch.zeros(features, dtype=torch.float32, device="cpu") if bias is None else _copy(bias)
        self._layer = (self._shape, self._packed.data_ptr(), self._bias.data_ptr())
        self._norm = None if norm is None else (_copy(norm.weight), _copy(norm.bias), norm.eps)

    def __call__(self, x: Tensor, *, gelu: bool = False, columns: slice | None = None) -> Tensor:
        """act(x Wᵀ + b).

        Args:
            x: [..., groups · in] of the weights' dtype.
            gelu: apply x Φ(x) (the exact one).
            columns: of the outputs, from a multiple of 32 on; one group only.
        """
        rows = self._checked(x)
        first, last, _ = (columns or slice(None)).indices(self.groups * self.out_features)
        out = torch.empty(rows.shape[0], last - first, dtype=self.dtype, device="cpu")
        self._run(rows, out, first, gelu, None)
        return out.view(*x.shape[:-1], last - first)

    def add_to(self, x: Tensor, residual: Tensor) -> Tensor:
        """x Wᵀ + b + residual, and the LayerNorm of that if the layer has one: [..., in], [..., out] → [..., out]."""
        rows, base = self._checked(x), self._residual(x, residual)  # held here: the call gets addresses
        out = torch.empty(rows.shape[0], self.out_features, dtype=self.dtype, device="cpu")
        self._run(rows, out, 0, False, self._after(base))
        return out.view(*x.shape[:-1], self.out_features)

    def feed_forward(self, down: PackedLinear, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """down(gelu(self(x))) + residual, with the LayerNorm of that if `down` has one: [..., in] → [..., in].

        The residual is x itself where none is given. The hidden values, 512 rows at a time, stay in the unit's layout.
        """
        rows = self._checked(x)
        out = torch.empty(rows.shape[0], down.out_features, dtype=self.dtype, device="cpu")
        base = down._residual(x, x if residual is None else residual)
        norm, threads = down._after(base), torch.get_num_threads()
        _call("feed_forward", self._layer, down._layer, _matrix(rows), _matrix(out), norm, threads)
        return out.view(*x.shape[:-1], down.out_features)

    def _residual(self, x: Tensor, residual: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if residual.dtype != self.dtype or residual.shape != shape or residual.device.type != "cpu":
            given = f"{residual.dtype} {tuple(residual.shape)} on {residual.device.type}"
            raise ArgumentError("residual", given, f"{self.dtype} {list(shape)} on the CPU")
        return _rows(residual)

    def _after(self, residual: Tensor) -> tuple[object, ...]:
        if self._norm is None:
            return _matrix(residual), 0, 0, 0.0
        weight, shift, eps = self._norm
        return _matrix(residual), weight.data_ptr(), shift.data_ptr(), eps

    def _checked(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or x.shape[-1] != self.groups * self.in_features or x.device.type != "cpu":
            given = f"{x.dtype} {tuple(x.shape)} on {x.device.type}"
            raise ArgumentError("x", given, f"{self.dtype} [..., {self.groups * self.in_features}] on the CPU")
        return _rows(x)

    def _run(self, rows: Tensor, out: Tensor, first: int, gelu: bool, norm: tuple[object, ...] | None) -> None:
        _call("linear", self._layer, _matrix(rows), _matrix(out), first, gelu, norm, torch.get_num_threads())


def shared_attention(
    q: Tensor,
    x: Tensor,
    visible: Tensor | None,
    scale: float,
    guide: Tensor | None = None,
    strength: Tensor | None = None,
) -> Tensor:
    """softmax(scale q xᵀ + strength guideᵀ) x, where all rows share keys and values: the middle of the absorbed form.

    Args:
        q: [B, R, dv] contiguous; overwritten with the result.
        x: [B, L, dv] of the same dtype, L ≥ 1, values of a token contiguous.
        visible: [B, L] bool or None; an item without any visible token gets zeros.
        guide, strength: [B, L] and [G], for the first G rows; or both None.

    Returns:
        `q`, [B, R, dv].

    Raises:
        ArgumentError: other shapes, dtypes or strides.
    """
    if (
        not q.is_contiguous()
        or q.is_neg()
        or q.device.type != "cpu"
        or x.dtype != q.dtype
        or x.ndim != 3
        or x.shape[::2] != q.shape[::2]
        or x.stride(2) != 1
    ):
        given = f"{q.dtype} {tuple(q.shape)} and {x.dtype} {tuple(x.shape)}, strides {x.stride()}"
        raise ArgumentError("q, x", given, "contiguous [B, R, dv] and [B, L, dv] with values of a token side by side")
    batch, rows, width = q.shape
    x = _plain(x)  # before its strides are asked for: what is carried out lies elsewhere
    sizes, strides = (batch, rows, x.shape[1], width), (q.stride(0), x.stride(0), x.stride(1))
    mask = None if visible is None else _values(visible)
    address = 0 if mask is None else mask.data_ptr()
    steer: tuple[int, int, int] = (0, 0, 0)
    if guide is not None and strength is not None:
        if guide.shape != x.shape[:2] or strength.ndim != 1 or strength.shape[0] > rows:
            shapes = f"{tuple(guide.shape)} and {tuple(strength.shape)}"
            raise ArgumentError("guide, strength", shapes, f"[{batch}, {x.shape[1]}] and at most [{rows}]")
        guide, strength = (_values(t.detach().to(torch.float32)) for t in (guide, strength))
        steer = (guide.data_ptr(), strength.data_ptr(), strength.shape[0])
    threads, code = torch.get_num_threads(), _CODES[q.dtype]
    addresses = (q.data_ptr(), x.data_ptr(), q.data_ptr())
    _call("shared_attention", *addresses, sizes, strides, code, address, steer, scale, threads)
    return q


def stream_attention(
    queries: Tensor,
    text: Tensor | None,
    text_starts: Tensor | None,
    lengths: tuple[int, int],
    num_heads: int,
    *,
    mixing: Mixing = "block",
    explore_sees_text: bool = False,
    text_wanted: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention over [A; E; T] per item, who sees whom as in :func:`tgq_fast.reference.stream_mask`.

    Args:
        queries: [B, Na + Ne, 3 d], query, key and value of each row side by side.
        text: [T, 3 d], the text rows of all items one after the other; [T, 2 d] (key, value) when they are
            not wanted; None without text.
        text_starts: [B + 1] int64, where each item's rows begin.
        lengths: (Na, Ne).
        num_heads: d / num_heads is a multiple of 16.

    Returns:
        [B, Na + Ne, d] and [T, d] (None without text or when not wanted).
    """
    queries, text = _values(queries), None if text is None else _values(text)
    text_starts = None if text_starts is None else _values(text_starts.to(torch.int64))
    batch, rows, width = queries.shape[0], queries.shape[1], queries.shape[2] // 3
    out = torch.empty(batch, rows, width, dtype=queries.dtype, device="cpu")
    text_out = None
    if text is not None and text_wanted:
        text_out = torch.empty(text.shape[0], width, dtype=queries.dtype, device="cpu")
    full = mixing == "full"
    sees = (mixing != "block", full, full or explore_sees_text, full)
    sizes = (batch, *lengths, num_heads, width // num_heads)
    addresses = [0 if t is None else t.data_ptr() for t in (queries, text, text_starts, out, text_out)]
    _call("stream_attention", *addresses, sizes, sees, _CODES[queries.dtype], torch.get_num_threads())
    return out, text_out
