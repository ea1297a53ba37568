"""Quantised codes of a pool: what an exact search reads first instead of the rows. docs/topk.md has layout and proof.

Rows are centred and rotated so that energy falls from the first direction to the last. The first directions are then
mixed among themselves, so that each column has as much as the next and bytes round all of them finely. The first level
holds them in bytes, a second one, where it pays, in half precision. Searches skip every row whose bound from either is
below the k-th best score.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.search.topk_arguments import DTYPES, as_tensor

__all__ = ["Basis", "Codes", "build_codes", "code_width", "encode_rows", "fit_basis", "fits", "join_codes"]

GROUP = 16  # rows whose codes lie together
LINE = 64  # columns of one line of codes
_LIMIT = 127  # largest magnitude of a code
_ZERO = 128  # the byte of the code 0
_LARGEST = 2.0**60  # norm of a centred row that is not coded
_SLACK = 1 + 2.0**-20  # on what is rounded to fp32 or summed in fp64
FIT_ROWS, _TRIAL_ROWS, _TRIAL_QUERIES = 16_384, 4096, 32
_VALUES = 4 << 20  # of rows in fp64, in memory at a time
_CHUNK = 4096  # rows encoded at a time at most, a multiple of GROUP
_HITS = 100  # the k that the choice of levels assumes
_LOOKED = 3.0  # a sampled threshold lets through so many times what the k-th best score does
WIDEST = 2048  # columns of a pool's rows: a wider rotation takes minutes to find, and more bytes than a shard's codes
_LARGEST_SHARE = 0.3  # of the rows' bytes that codes with a second level take at most


def code_width(dims: int) -> int:
    """Columns of a row's codes: D padded to a multiple of 64."""
    return -(-dims // LINE) * LINE


@dataclass(frozen=True)
class Basis:
    """What rows are centred by and rotated with, and where the first level ends.

    Attributes:
        mean: [D] float32.
        rotation: [D, D] float32, a direction per row: those of the first level, then the others, energy falling.
        first: columns of the first level, a multiple of 64.
        second: whether there is a second level, the same columns in half precision.
        spread: the norm of a row's codes above which the row gets coarser ones.
        defect: at least ‖RᵀR - I‖ of the rotation as stored.
        explained: share of the centred energy in the first level of the rows it was fitted to.
    """

    mean: Tensor
    rotation: Tensor
    first: int
    second: bool
    spread: float
    defect: float
    explained: float

    def same(self, other: Basis) -> bool:
        """Whether codes in both may be joined."""
        levels = (self.first, self.second, self.defect) == (other.first, other.second, other.defect)
        return levels and torch.equal(self.mean, other.mean) and torch.equal(self.rotation, other.rotation)


@dataclass(frozen=True)
class Codes:
    """Codes of N rows. Answers of a search do not depend on them as long as they are those of its pool.

    Attributes:
        basis: of these rows and maybe others.
        codes: [first / 64, G, 16, 16, 4] uint8: for each 64 columns and each 16 rows, 16 words of 4 columns, of every
            row in turn; 128 + the code.
        second: [16 G, first] float16, the same columns in units of `scale`; no columns where there is no second level.
        scale: [16 G] float32, what a code of 1 stands for.
        rest: [16 G] float32, at least the norm beyond the first level; infinite for rows that are not coded.
        rows: N; those up to 16 G are padding.
        step: per level, at least the norm of a row's rounding error in units of `scale`.
        norm: per level, at least the norm of a row's codes.
        explained: share of the centred energy in the first level; 1.0 for no energy.
    """

    basis: Basis
    codes: Tensor
    second: Tensor
    scale: Tensor
    rest: Tensor
    rows: int
    step: tuple[float, ...]
    norm: tuple[float, ...]
    explained: float

    @cached_property
    def _met(self) -> set[tuple[int, ...]]:
        """Shapes of pools that passed the check: a search of one query is not to wait for it each time."""
        return set()

    @cached_property
    def addresses(self) -> tuple[Any, ...] | None:
        """What `codes_of` in csrc/bindings/bindings.cpp reads; None for codes of no rows."""
        basis = self.basis
        if not self.codes.numel():
            return None
        return (
            self.codes.data_ptr(),
            self.codes.stride(0),
            basis.first // LINE,
            -(-len(basis.mean) // LINE),
            self.scale.data_ptr(),
            self.rest.data_ptr(),
            basis.mean.data_ptr(),
            basis.rotation.data_ptr(),
            basis.defect,
            self.step,
            self.norm,
            self.second.data_ptr() if basis.second else 0,
        )

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a copy has other addresses."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self, pool: Tensor) -> None:
        """Raises ArgumentError unless these can be the codes of `pool` [N, D]."""
        if tuple(pool.shape) not in self._met:
            self._check(*pool.shape)
            self._met.add(tuple(pool.shape))

    def _check(self, rows: int, dims: int) -> None:
        groups, lines = -(-rows // GROUP), code_width(dims) // LINE
        first = self.basis.first
        if first % LINE or not 0 < first <= lines * LINE:
            raise ArgumentError("codes.basis.first", first, f"a multiple of {LINE} from {LINE} to {lines * LINE}")
        levels = 1 + self.basis.second
        wanted = {
            "basis.mean": (self.basis.mean, torch.float32, [dims]),
            "basis.rotation": (self.basis.rotation, torch.float32, [dims, dims]),
            "codes": (self.codes, torch.uint8, [first // LINE, groups, 16, GROUP, 4]),
            "second": (self.second, torch.float16, [groups * GROUP, first if self.basis.second else 0]),
            "scale": (self.scale, torch.float32, [groups * GROUP]),
            "rest": (self.rest, torch.float32, [groups * GROUP]),
        }
        for name, (tensor, dtype, shape) in wanted.items():
            inner = tensor[0] if name == "codes" and len(tensor) else tensor  # a plane may be part of a larger one
            fits = tensor.dtype == dtype and list(tensor.shape) == shape and inner.is_contiguous()
            if not fits or tensor.device.type != "cpu":
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise ArgumentError(f"codes.{name}", got, f"{dtype} {shape}, contiguous, on the CPU")
        if self.rows != rows or len(self.step) != levels or len(self.norm) != levels:
            raise ArgumentError("codes", f"{self.rows} rows, {len(self.step)} levels", f"{rows} rows, {levels} levels")

    @plain_defaults()
    def take(self, rows: Tensor) -> Codes:
        """The codes of the rows that `rows` [n] int64 names, copied."""
        groups, lines = -(-len(rows) // GROUP), len(self.codes)
        padded = torch.nn.functional.pad(rows, (0, groups * GROUP - len(rows)))  # padding repeats row 0
        whole = self.codes.permute(1, 3, 0, 2, 4).reshape(-1, lines, 16, 4)[padded]
        codes = whole.view(groups, GROUP, lines, 16, 4).permute(2, 0, 3, 1, 4).contiguous()
        return replace(
            self,
            codes=codes,
            second=self.second[padded],
            scale=self.scale[padded],
            rest=self.rest[padded],
            rows=len(rows),
        )

    @plain_defaults()
    def part(self, first: int, stop: int) -> Codes:
        """The codes of rows `first` … `stop`, in place where `first` is a multiple of 16."""
        if first % GROUP:
            return self.take(torch.arange(first, stop))
        groups = slice(first // GROUP, -(-stop // GROUP))
        padded = slice(groups.start * GROUP, groups.stop * GROUP)
        return replace(
            self,
            codes=self.codes[:, groups],
            second=self.second[padded],
            scale=self.scale[padded],
            rest=self.rest[padded],
            rows=stop - first,
        )


def fits(basis: Basis, explained: float) -> bool:
    """Whether rows with this explained share are as good as in a basis of their own: at most half as much lies beyond
    the first level again."""
    return 1.0 - explained <= 1.5 * (1.0 - basis.explained) + 0.005


@plain_defaults()
def build_codes(rows: Any) -> Codes:
    """Codes of a pool [N, D] (float32, float16 or bfloat16, on the CPU, strided too) for searches to come.

    Raises:
        ArgumentError: another shape or dtype.
    """
    rows = _rows(rows)
    return encode_rows(rows, fit_basis(rows))


def _rows(rows: Any) -> Tensor:
    rows = as_tensor("rows", rows)
    if rows.ndim != 2 or rows.dtype not in DTYPES or rows.device.type != "cpu":
        got = f"{rows.dtype} {list(rows.shape)} on {rows.device}"
        raise ArgumentError("rows", got, "[N, D] float32, float16 or bfloat16 on the CPU")
    return rows


@plain_defaults()
def fit_basis(rows: Any, count: int | None = None, levels: tuple[int, bool] | None = None) -> Basis:
    """Principal directions of a strided sample of rows [N, D], and the levels that pay on them.

    Args:
        rows: the pool or a sample of it.
        count: rows of the pool; default: of `rows`.
        levels: columns of the first level, a multiple of 64, and whether there is a second; default: what pays.
    """
    rows = _rows(rows)
    dims = rows.shape[1]
    count = rows.shape[0] if count is None else count
    sample = rows[:: -(-max(len(rows), 1) // FIT_ROWS)]
    parts = sample.split(max(1, _VALUES // max(dims, 1)))  # wide rows of a sample do not fit in memory at once
    total, used = torch.zeros(dims, dtype=torch.float64), 0
    for part in map(_coded, parts):
        total, used = total + part.sum(dim=0), used + len(part)
    mean = (total / max(used, 1)).float()
    scatter = torch.zeros(dims, dims, dtype=torch.float64)
    for part in map(_coded, parts):
        part -= mean.double()
        scatter.addmm_(part.T, part)
    values, directions = torch.linalg.eigh(scatter) if dims else (torch.empty(0), torch.empty(0, 0))
    principal, energy = directions.flip(1).T.double(), values.flip(0).clamp(min=0).double()  # energy falling
    trial = _coded(sample[:: -(-max(len(sample), 1) // max(1, min(_TRIAL_ROWS, _VALUES // max(dims, 1))))])
    trial -= mean.double()
    first, second = levels or _choose_levels(trial, parts, mean.double(), principal, count)
    rotation = torch.cat((_mixing(min(first, dims)) @ principal[:first], principal[first:])).float()
    exact = rotation.double()
    defect = float((exact.T @ exact - torch.eye(dims, dtype=torch.float64)).norm()) * _SLACK + 2.0**-40
    explained = _share(float(energy[:first].sum()), float(energy.sum()))
    return Basis(mean, rotation, first, second, _spread(trial @ exact[:first].T), defect, explained)


def _coded(rows: Tensor) -> Tensor:
    """The rows that get codes, as float64."""
    rows = rows.double()
    rows = rows[torch.isfinite(rows).all(dim=1)]
    return rows[rows.norm(dim=1) < _LARGEST]


def _mixing(columns: int) -> Tensor:
    """A random orthogonal matrix: each of its outputs has about the same share of every input's energy."""
    values = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(values).Q


def _spread(part: Tensor) -> float:
    """Median norm of codes whose largest magnitude is 127."""
    if not part.numel():
        return float(_LIMIT)
    largest = part.abs().amax(dim=1)
    norms = part.norm(dim=1)[largest > 0] / largest[largest > 0]
    return _LIMIT * float(norms.median()) if len(norms) else float(_LIMIT)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0


def _choose_levels(
    trial: Tensor, parts: Sequence[Tensor], mean: Tensor, principal: Tensor, count: int
) -> tuple[int, bool]:
    """Columns of the first level, and whether a second pays: what answers rows of the sample at least cost.

    Args:
        trial: [n, D] some centred rows.
        parts: the sample, as stored.
        mean: [D].
        principal: [D, D] directions, energy falling.
        count: rows of the pool.
    """
    dims, width, item = len(mean), code_width(len(mean)), parts[0].element_size()
    if width <= LINE or len(trial) < 16 * GROUP:
        return max(width, LINE), False
    # Rows serve as queries. None may find itself: for a large pool one hit is asked for, and it would be that.
    asked = torch.randperm(len(trial), generator=torch.Generator().manual_seed(0))[:_TRIAL_QUERIES]
    scores = torch.cat([(trial[asked] + mean) @ (_coded(part) - mean).T for part in parts], dim=1)
    rank = min(max(1, round(_HITS * scores.shape[1] / count)), scores.shape[1] - 1)
    threshold = scores.topk(rank + 1, dim=1).values[:, -1:]
    rows = trial @ principal.T
    queries = rows[asked] + principal @ mean
    best, choice = float("inf"), (width, False)
    for first in range(LINE, width + 1, LINE):
        ours, theirs = rows[:, :first], queries[:, :first]
        fine = theirs @ ours.T + rows[:, first:].norm(dim=1) * queries[:, first:].norm(dim=1, keepdim=True)
        # What rounding to bytes adds: .3 of a step per column and side; a step is the largest of mixed columns, some
        # three times the usual one, by 127.
        bound = fine + 2 * 0.3 * 3.2 / _LIMIT * ours.norm(dim=1) * theirs.norm(dim=1, keepdim=True)
        left, scored = (float((b >= threshold).double().mean()) for b in (bound, fine))
        small = 3 * first + 8 <= _LARGEST_SHARE * dims * item  # with a second level
        for looked, rescored in ((0.0, left), (_LOOKED * left, scored))[: 1 + small]:
            # One query is bound by bytes, many by instructions (nanoseconds of a row, as measured on a matrix unit).
            read = (first + 8 + looked * 3 * first + rescored * 1.5 * dims * item) / (width + 8)
            work = 0.1 + first / 640 + looked * (5 + first / 8) + rescored * (30 + dims * item / 10)
            cost = read + work / (0.1 + width / 640)
            if cost < best - 0.02:
                best, choice = cost, (first, looked > 0)
    return choice


@plain_defaults()
def encode_rows(rows: Any, basis: Basis) -> Codes:
    """Codes of rows [N, D] in a basis, that of other rows too: any basis gives right answers, a good one fast ones."""
    rows = _rows(rows)
    count, dims = rows.shape
    if basis.mean.shape != (dims,):
        raise ArgumentError("basis", f"of {len(basis.mean)} columns", f"of {dims}, as the rows")
    module = _native.extension()
    if module is None:
        raise BackendError("build_codes", "cpp", {"cpp": [_native.why_missing()]})
    groups, width = -(-count // GROUP), max(code_width(dims), LINE)
    codes = torch.full((basis.first // LINE, groups, 16, GROUP, 4), _ZERO, dtype=torch.uint8)
    second = torch.zeros(groups * GROUP, basis.first if basis.second else 0, dtype=torch.float16)
    scale, rest = torch.zeros(groups * GROUP), torch.zeros(groups * GROUP)
    step, norm, energy, inside = [0.0] * (1 + basis.second), [0.0] * (1 + basis.second), 0.0, 0.0
    mean, rotation = basis.mean.double(), basis.rotation.double().T.contiguous()
    arrays = (codes.data_ptr(), codes.stride(0), scale.data_ptr(), rest.data_ptr())
    chunk = min(_CHUNK, max(GROUP, _VALUES // max(dims, 1) // GROUP * GROUP))
    for start in range(0, count, chunk):
        centred = rows[start : start + chunk].double() - mean
        norms = centred.norm(dim=1)
        coded = norms < _LARGEST  # NaN is not
        if not coded.all():
            centred[~coded] = 0.0
        turned = torch.zeros(len(centred), width, dtype=torch.float64)
        turned[:, :dims] = centred @ rotation
        found = module.encode_codes(
            turned.data_ptr(),
            coded.data_ptr(),
            len(centred),
            start,
            (basis.first // LINE, width // LINE),
            basis.spread,
            arrays,
        )
        levels = [found[:2]]
        if basis.second:
            part = slice(start, start + len(turned))
            levels.append(_halve(turned[:, : basis.first], scale[part], second[part]))
        for level, (lost, length) in enumerate(levels):
            step[level], norm[level] = max(step[level], lost), max(norm[level], length)
        inside, energy = inside + found[2], energy + found[3]
    return Codes(basis, codes, second, scale, rest, count, tuple(step), tuple(norm), _share(inside, energy))


def _halve(columns: Tensor, scale: Tensor, out: Tensor) -> tuple[float, float]:
    """Writes columns [n, first] float64 in units of `scale` [n] to `out` in float16; norms of errors and of codes."""
    exact = torch.where(scale[:, None] > 0, columns / scale[:, None], 0.0)
    out.copy_(exact)
    kept = out.double()
    return float((exact - kept).norm(dim=1).max()) * _SLACK, float(kept.norm(dim=1).max()) * _SLACK


@plain_defaults()
def join_codes(parts: Sequence[Codes]) -> Codes | None:
    """The codes of several pools one after another; None where they are not of one basis."""
    basis = parts[0].basis
    if len(parts) == 1:
        return parts[0]
    if not all(part.basis is basis or basis.same(part.basis) for part in parts):
        return None
    count = sum(part.rows for part in parts)
    second = torch.zeros(-(-count // GROUP) * GROUP, parts[0].second.shape[1], dtype=torch.float16)
    groups, lines = -(-count // GROUP), len(parts[0].codes)
    if not count:
        return parts[0]
    rows = torch.full((groups * GROUP, lines, 16, 4), _ZERO, dtype=torch.uint8)
    scale, rest = torch.zeros(groups * GROUP), torch.zeros(groups * GROUP)
    start = 0
    for part in parts:
        stop = start + part.rows
        rows[start:stop] = part.codes.permute(1, 3, 0, 2, 4).reshape(-1, lines, 16, 4)[: part.rows]
        second[start:stop] = part.second[: part.rows]
        scale[start:stop], rest[start:stop] = part.scale[: part.rows], part.rest[: part.rows]
        start = stop
    codes = rows.view(groups, GROUP, lines, 16, 4).permute(2, 0, 3, 1, 4).contiguous()
    step, norm = (tuple(map(max, zip(*values))) for values in ([p.step for p in parts], [p.norm for p in parts]))
    weight = sum(part.explained * part.rows for part in parts) / count if count else 1.0
    return Codes(basis, codes, second, scale, rest, count, step, norm, weight)
