"""Which backend runs an operator: request, rejection reasons, the decision and its explanation.

Requests, strongest first: the operator's `backend=` argument, :func:`use_backend`, the environment variable
``TGQ_BACKEND``, then "auto". A requested backend that cannot run is an error that lists every reason; "auto"
takes the first backend that can and logs once per operator why an earlier one could not. A request by context or
environment is for the operators that have such a backend; the others choose as under "auto".

"cpp" is the processor's matrix unit (:mod:`tgq_fast.ops.matrix_unit`), a backend of layers with packed weights.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError, BackendError

__all__ = ["BACKENDS", "Decision", "choose", "explain", "explainer", "requested_backend", "use_backend"]

logger = logging.getLogger("tgq_fast.ops")

BACKENDS = ("auto", "triton", "flash_attn", "cpp", "torch")
PACKED_ONLY = ("only layers with packed weights run there (tgq_fast.models.inference)",)  # of "cpp", to an operator
ENVIRONMENT_VARIABLE = "TGQ_BACKEND"

_logged: set[tuple[str, str]] = set()
_explainers: dict[str, Callable[..., Decision]] = {}


@dataclass(frozen=True)
class Decision:
    """What runs and why.

    Attributes:
        op: name of the operator.
        requested: the backend asked for ("auto" unless argument, context or environment says otherwise).
        backend: the backend that runs.
        form: where the operator has several: "projected", "absorbed" or "fused" (absorbed, in one kernel); of a layer
            with packed weights "packed" or "plain".
        rejected: backend → why it cannot run here.
        notes: how the form was chosen and other facts worth knowing.
    """

    op: str
    requested: str
    backend: str
    form: str | None = None
    rejected: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether a layer runs on its packed weights."""
        return self.form == "packed"

    def __str__(self) -> str:
        head = f"{self.op}: {self.backend}" + (f" ({self.form} form)" if self.form else "")
        lines = [f"{head}, requested {self.requested}"]
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.rejected.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


class _Block:
    """An open block of :func:`use_backend`."""

    def __init__(self, name: str) -> None:
        self.name = name


_blocks: list[_Block] = []  # the last one counts


def _checked(name: str, argument: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ArgumentError(argument, repr(name), "one of " + ", ".join(map(repr, BACKENDS)))
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator of the block on one backend; process-wide, like the flags of ``torch.backends``.

    Of blocks that several threads have open, the one begun last counts.

    Args:
        name: "auto", "triton", "flash_attn", "cpp" or "torch".

    Raises:
        ArgumentError: an unknown name.
        BackendError: raised by an operator inside the block that the backend cannot run.
    """
    block = _Block(_checked(name, "name"))
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)  # blocks of several threads end in any order


def requested_backend(argument: str | None) -> str:
    """The backend in force for a call with this `backend=` argument."""
    if argument is not None:
        return _checked(argument, "backend")
    if last := _blocks[-1:]:
        return last[0].name
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def choose(
    op: str, argument: str | None, candidates: Mapping[str, Sequence[str]]
) -> tuple[str, str, dict[str, Sequence[str]]]:
    """Pick a backend.

    Args:
        op: operator name, for messages.
        argument: the call's `backend=`.
        candidates: backend → reasons why it cannot run (empty: it can), in the order "auto" prefers.

    Returns:
        requested name, chosen name, rejected backends with their reasons.

    Raises:
        BackendError: a backend was asked for by name and cannot run, or none can.
    """
    requested = requested_backend(argument)
    rejected = {name: why for name, why in candidates.items() if why}
    if requested not in candidates and argument not in (None, "auto"):
        why = PACKED_ONLY if requested == "cpp" else ("this operator has no such backend",)
        raise BackendError(op, requested, {requested: why})
    if requested in candidates:
        if reasons := candidates[requested]:
            raise BackendError(op, requested, {requested: reasons})
        return requested, requested, rejected
    if len(rejected) == len(candidates):
        raise BackendError(op, requested, rejected)
    chosen = next(name for name, why in candidates.items() if not why)
    for name in candidates:
        if name == chosen:
            break
        _log_once(op, f"{op}: {name} not used: {'; '.join(candidates[name])}; running {chosen}")
    return requested, chosen, rejected


def decide_packed(op: str, reasons: Sequence[str], elsewhere: str = "") -> Decision:
    """Whether a layer runs on its packed weights.

    Args:
        op: name of the layer's operator.
        reasons: why the call cannot (empty: it can).
        elsewhere: why the weights are packed for another library than the matrix unit, whose calls "torch" makes.

    Raises:
        BackendError: "cpp" was asked for by name and cannot run.
    """
    requested = requested_backend(None)
    if requested == "cpp" and (elsewhere or reasons):
        raise BackendError(op, requested, {requested: [elsewhere] if elsewhere else reasons})
    if requested not in ("auto", "cpp"):
        reasons = [*reasons, f"{requested} was asked for"]
    if reasons:
        return Decision(
            op, requested, "torch", "plain", {"packed weights": reasons}, ("its operators decide themselves",)
        )
    return Decision(op, requested, "torch" if elsewhere else "cpp", "packed", {"cpp": [elsewhere]} if elsewhere else {})


def _log_once(op: str, message: str) -> None:
    if torch.compiler.is_compiling() or (op, message) in _logged:
        return
    _logged.add((op, message))
    logger.info(message)


def triton_reasons(*tensors: Tensor | None, forced: bool) -> list[str]:
    """Why the Triton kernels cannot take these tensors; empty when they can.

    Args:
        forced: the backend was asked for by name, which is what makes the (slow) interpreter eligible.
    """
    if not triton_importable():
        return ["triton is not installed"]
    given = [t for t in tensors if t is not None]
    floating = [t for t in given if t.is_floating_point()]
    reasons = []
    devices = {t.device for t in given}
    kinds = {device.type for device in devices}
    if len(devices) > 1:
        reasons.append("tensors are on several devices")
    if kinds == {"cuda"}:
        major, minor = _capability(given[0].device.index or 0)
        if major < 8:
            reasons.append(f"compute capability {major}.{minor} is below 8.0")
    elif kinds != {"cpu"} or not triton_interprets():
        reasons.append(f"tensors are on {', '.join(sorted(kinds))}, not on a CUDA device")
    elif not forced:
        reasons.append("on the CPU only Triton's interpreter could run, which must be asked for by name")
    dtypes = {t.dtype for t in floating}
    for dtype in sorted(dtypes - {torch.float32, torch.float16, torch.bfloat16}, key=str):
        reasons.append(f"no kernels for {dtype}")
    if kinds == {"cpu"} and torch.bfloat16 in dtypes:
        reasons.append("bfloat16 is wrong in Triton's interpreter")
    return reasons


# Facts of the machine and process: constant while a compiled graph lives, so the tracer need not look inside.
@torch.compiler.assume_constant_result
@cache
def triton_importable() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def triton_interprets() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1 and so runs on CPU tensors."""
    from tgq_fast.kernels.tiling import interpreting

    return interpreting()


@torch.compiler.assume_constant_result
def flash_attn_importable() -> bool:
    """Whether the flash-attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> tuple[int, float]:
    """Multiprocessors of a GPU (0: not one), and its correction of :mod:`tgq_fast.kernels.cross_attention_fusion`."""
    if device.type != "cuda":
        return 0, 1.0
    from tgq_fast.kernels.tiling import limit

    count = torch.cuda.get_device_properties(device).multi_processor_count
    return count, limit("fused_correction", device) or 1.0


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def explainer(op: str) -> Callable[[Callable[..., Decision]], Callable[..., Decision]]:
    """Register the function that decides for operator `op`; it takes the operator's own arguments."""

    def register(function: Callable[..., Decision]) -> Callable[..., Decision]:
        _explainers[op] = function
        return function

    return register


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Decision:
    """Which backend and form a call would run, and why; nothing is computed.

    Args:
        op: the operator or its name; `args` and `kwargs` are the operator's. Or a module that decides by itself, as
            an attention that :func:`tgq_fast.patch` changed does; they are then its forward's.

    Raises:
        ArgumentError: not an operator of this package.
        BackendError: the requested backend cannot run this call.
    """
    if callable(decide := getattr(op, "decide", None)):
        return decide(*args, **kwargs)
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _explainers:
        raise ArgumentError("op", name, "one of " + ", ".join(sorted(_explainers)))
    return _explainers[name](*args, **kwargs)
