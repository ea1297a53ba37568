"""Checks the arguments of `topk` and brings them into one form.

Queries and pool arrive as torch tensors, numpy arrays (memory maps too) or anything with DLPack. Nothing is copied
unless torch cannot express the memory (negative strides, foreign byte order).
"""

from __future__ import annotations

import operator
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError
from tgq_fast.reference import TopK

MAX_K = 2048
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("exact", "native")
_MAX_ROWS = 2**32 - 1  # an index is 32 bits of the order key


def as_tensor(name: str, value: Any) -> Tensor:
    """A dense tensor over the memory of `value`; its memory holds its values, so that its address may be passed on.

    A tensor whose negation, conjugation or zeros torch keeps as a mark beside other memory is copied.
    """
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided:
            kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
            raise ArgumentError(name, kind, "a dense (strided) tensor")
        plain = value
        if value.requires_grad or value.is_conj() or value.is_neg() or value._is_zerotensor():
            plain = value.detach()
            plain = (plain.clone() if plain._is_zerotensor() else plain).resolve_conj().resolve_neg()
        if not _in_memory(plain):
            raise ArgumentError(
                name, f"a {type(value).__name__} whose values do not lie in memory", "a plain tensor",
                "Tensors of function transforms, of tracing, wrapped and sharded ones must be made plain first.",
            )  # fmt: skip
        return plain
    if isinstance(value, np.ndarray):
        return _from_numpy(name, value)
    if hasattr(value, "__dlpack__"):
        try:
            return torch.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(name, type(value).__name__, "memory that DLPack can share", str(error)) from error
    raise ArgumentError(name, type(value).__name__, "a torch tensor, a numpy array or an object with __dlpack__")


def _in_memory(tensor: Tensor) -> bool:
    """Whether the address of a dense tensor leads to all of its values, as it must before it is passed on."""
    if tensor.is_meta or not tensor.numel():
        return True
    try:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        return needed <= tensor.untyped_storage().nbytes() and tensor.data_ptr() != 0
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def _from_numpy(name: str, array: np.ndarray) -> Tensor:
    bfloat16 = array.dtype.name == "bfloat16"
    if isinstance(array, np.ma.MaskedArray):
        raise ArgumentError(
            name, "a masked array", "a plain array", "Decide with .filled(value) what masked values are."
        )
    if bfloat16:
        array = array.view(np.int16)
    elif array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise ArgumentError(name, f"numpy dtype {array.dtype}", "float32, float16, bfloat16 or whole numbers")
    strided = any(stride < 0 or stride % array.itemsize for stride in array.strides)
    if strided or not array.dtype.isnative or not array.flags.aligned:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # Read-only memory (a memory map) is fine: the search only reads it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if bfloat16 else tensor


def floating_rows(name: str, value: Any, dims: int) -> Tensor:
    """[n, dims] on the CPU, of the dtypes of a pool or float64, for calls that store or search them in another dtype.

    Raises:
        ArgumentError: another shape or dtype; names the argument.
    """
    rows = as_tensor(name, value)
    if rows.ndim != 2 or rows.shape[1] != dims or rows.dtype not in (*DTYPES, torch.float64):
        given = f"{tuple(rows.shape)} {rows.dtype}"
        raise ArgumentError(name, given, f"[n, {dims}] of float32, float16, bfloat16 or float64")
    if rows.is_meta:
        raise ArgumentError(name, "a tensor on the meta device", "one that holds values")
    return rows.cpu()


def check_matrices(queries: Any, pool: Any) -> tuple[Tensor, Tensor]:
    """Queries [Q, D] and pool [N, D] as tensors of the accepted dtypes, on one device or the queries on a GPU alone."""
    q, p = as_tensor("queries", queries), as_tensor("pool", pool)
    for name, tensor, given in (("queries", q, queries), ("pool", p, pool)):
        if tensor.ndim != 2:
            raise ArgumentError(name, f"shape {tuple(tensor.shape)}", "a matrix [rows, D]")
        if tensor.dtype not in DTYPES:
            convert = 'astype("float32")' if isinstance(given, np.ndarray) else "float()"
            hint = f"Convert with {name}.{convert}."
            raise ArgumentError(name, f"dtype {tensor.dtype}", "float32, float16 or bfloat16", hint)
    if q.shape[1] != p.shape[1]:
        raise ArgumentError("queries", f"width D = {q.shape[1]}", f"the pool's width {p.shape[1]}")
    if not (p.is_cpu and (q.is_cpu or q.is_cuda)) and q.device != p.device:
        expected = f"the pool's device {p.device}" + (", or a CUDA device" if p.is_cpu else "")
        raise ArgumentError("queries", f"device {q.device}", expected)
    if p.shape[0] > _MAX_ROWS:
        raise ArgumentError("pool", f"{p.shape[0]} rows", f"at most {_MAX_ROWS} rows", "Search shards and merge them.")
    return q, p


def check_k(k: Any) -> int:
    """k as an int in 1 … 2048."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise ArgumentError("k", repr(k), f"an integer from 1 to {MAX_K}")
    if not 1 <= k <= MAX_K:
        raise ArgumentError("k", int(k), f"an integer from 1 to {MAX_K}")
    return int(k)


def check_exclude(exclude: Any, num_queries: int, pool_size: int, device: torch.device) -> Tensor | None:
    """Excluded pool rows as contiguous int64 [Q, X]; entries below zero mean none."""
    if exclude is None:
        return None
    expected = f"[{num_queries}] or [{num_queries}, X] integers, or one list of integers per query"
    if isinstance(exclude, Sequence) and not isinstance(exclude, str | bytes):
        exclude = _ragged(exclude, expected)
    rows = as_tensor("exclude", exclude)
    if rows.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ArgumentError("exclude", f"dtype {rows.dtype}", "int64 pool rows")
    if rows.ndim not in (1, 2) or rows.shape[0] != num_queries:
        raise ArgumentError("exclude", f"shape {tuple(rows.shape)}", expected)
    rows = rows[:, None] if rows.ndim == 1 else rows
    rows = rows.to(device=device, dtype=torch.int64).contiguous()  # [Q, X]
    # A comparison on a CUDA tensor would wait for the device: there the rows are only compared with hits.
    if rows.numel() and device.type == "cpu" and int(rows.max()) >= pool_size:
        raise ArgumentError("exclude", f"pool row {int(rows.max())}", f"rows below the pool size {pool_size}")
    return rows


def check_allowed(allowed: Any, pool_size: int, device: torch.device) -> Tensor | None:
    """The rows that may be returned as contiguous bool [N]."""
    if allowed is None:
        return None
    if isinstance(allowed, np.ndarray) and allowed.dtype == np.bool_:
        allowed = allowed.view(np.uint8)
    rows = as_tensor("allowed", allowed)
    if rows.dtype not in (torch.bool, torch.uint8) or tuple(rows.shape) != (pool_size,):
        raise ArgumentError("allowed", f"{rows.dtype} {tuple(rows.shape)}", f"bool ({pool_size},), one per pool row")
    return rows.to(device=device, dtype=torch.bool).contiguous()


def _ragged(rows: Sequence[Any], expected: str) -> np.ndarray:
    lists: list[list[int]] = []
    for i, row in enumerate(rows):
        try:
            single = hasattr(row, "__index__") and not getattr(row, "shape", ())
            lists.append([_row(row)] if single else [_row(value) for value in row])
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError("exclude", f"{reprlib.repr(row)} for query {i}", expected) from None
    table = np.full((len(lists), max(map(len, lists), default=0)), -1, dtype=np.int64)
    for i, values in enumerate(lists):
        table[i, : len(values)] = values
    return table


def _row(value: Any) -> int:
    row = operator.index(value)
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or not -(2**63) <= row < 2**63:
        raise ValueError(value)
    return row


def check_out(out: Any, num_queries: int, k: int, device: torch.device) -> TopK:
    """The result tensors: fresh ones, or the caller's `(scores, indices)` after checking them."""
    shape = (num_queries, k)
    if out is None:
        return TopK(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int64, device=device),
        )
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise ArgumentError("out", type(out).__name__, "a pair (scores, indices)")
    checked = []
    for name, value, dtype in (("out[0]", out[0], torch.float32), ("out[1]", out[1], torch.int64)):
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            raise ArgumentError(name, "a read-only array", "writable memory")
        tensor = as_tensor(name, value)
        if isinstance(value, Tensor) and tensor.data_ptr() != value.data_ptr():
            raise ArgumentError(name, "a tensor with a lazy negation or conjugation", "memory that can be written")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ArgumentError(name, given, f"{dtype} {shape} on {device}")
        if isinstance(value, np.ndarray) and tensor.data_ptr() != value.ctypes.data:
            raise ArgumentError(name, f"strides {value.strides}", "memory that can be written in place")
        checked.append(tensor)
    return TopK(*checked)


def check_results(parts: Any) -> list[TopK]:
    """The results that are to be merged, one at least."""
    if not isinstance(parts, (list, tuple)) or isinstance(parts, TopK):
        raise ArgumentError("parts", f"a {type(parts).__name__}", "a list of TopK")
    if not parts:
        raise ArgumentError("parts", "none", "at least one TopK")
    return [check_result(part) for part in parts]


def check_offsets(offsets: Any, parts: int) -> list[int]:
    """The first pool row of each part; zeros for None."""
    if offsets is None:
        return [0] * parts
    expected = f"None, or one pool row for each of the {parts} parts"
    try:
        rows = [_row(offset) for offset in offsets]
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError("offsets", reprlib.repr(offsets), expected) from None
    if len(rows) != parts or min(rows) < 0:
        raise ArgumentError("offsets", reprlib.repr(offsets), expected)
    return rows


def check_result(part: Any) -> TopK:
    """A result that is to be merged, its values in memory."""
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise ArgumentError("parts", type(part).__name__, "TopK, or pairs (scores, indices)")
    scores, indices = as_tensor("parts", part[0]), as_tensor("parts", part[1])
    kinds = scores.is_floating_point() and indices.dtype == torch.int64
    if scores.ndim != 2 or indices.shape != scores.shape or not kinds:
        given = f"{scores.dtype} {tuple(scores.shape)} and {indices.dtype} {tuple(indices.shape)}"
        raise ArgumentError("parts", given, "floating scores and int64 indices, [Q, k] both")
    return TopK(scores, indices)


def check_threads(num_threads: Any) -> int:
    """Worker threads; None means as many as torch uses."""
    if num_threads is None:
        return torch.get_num_threads()
    if isinstance(num_threads, bool) or not isinstance(num_threads, (int, np.integer)) or not 1 <= num_threads <= 1024:
        raise ArgumentError("num_threads", repr(num_threads), "None or an integer from 1 to 1024")
    return int(num_threads)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ArgumentError(name, repr(value), " | ".join(repr(choice) for choice in choices))
    return value
