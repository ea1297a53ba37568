"""Cases that are functions of named tensors: forward, backward and full runs of any candidate from one description."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Kind, Setting, UnavailableError, Variant, Workload
from benchmarks.ceilings import Work
from benchmarks.parity import OWN_SLACK, PEER_SLACK, Verdict, check, higher_precision
from benchmarks.timing import input_sets

# Named tensors in, named tensors out.
Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass
class Candidate:
    """A way to compute the operator.

    Attributes:
        why_not: why it cannot run here, asked before anything else; empty when it can.
        describe: tensors → what was chosen.
    """

    name: str
    kind: Kind
    function: Function
    compiled: bool = False
    why_not: Callable[[], str] | None = None
    describe: Callable[[dict[str, Tensor]], str] | None = None


def dtype_of(case: Case) -> torch.dtype:
    found = getattr(torch, case.dtype)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{case.name}: {case.dtype} is not a dtype")
    return found


def slack_of(variant: Variant) -> float:
    """How much of the allowed error a variant may take."""
    return OWN_SLACK if variant.kind in ("ours", "before") else PEER_SLACK


def compiled_statically(function: AnyFunction) -> AnyFunction:
    """`function` through torch.compile with static shapes."""
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


def tensor_workload(
    case: Case,
    setting: Setting,
    *,
    make: Callable[[torch.Generator], dict[str, Tensor]],
    candidates: Sequence[Candidate],
    references: Sequence[Function],
    wrt: Sequence[str],
    weights: Sequence[str] = (),
    work: Work,
) -> Workload:
    """Build the workload of a case.

    Args:
        make: generator → one input set, in the case's dtype on the case's device.
        references: the definition in each of its algebraic forms; the first, in higher precision, is the reference.
        wrt: names of the inputs whose gradient is wanted in "backward" and "full".
        weights: those of them whose error may be three times the baseline's (sums over the whole batch).
    """
    first = make(_generator(setting, 0))
    count = input_sets(sum(t.numel() * t.element_size() for t in first.values()), setting.device)
    sets = [first, *(make(_generator(setting, i)) for i in range(1, count))]
    if case.direction != "forward":
        for tensors in sets:
            for name in wrt:
                tensors[name].requires_grad_(True)
    gradients = _Gradients()
    dtype = dtype_of(case)
    known: dict[str, Any] = {}

    def verdict(variant: Variant, out: Mapping[str, Tensor]) -> Verdict:
        if not known:
            high = higher_precision(dtype)
            raised = {k: t.detach().to(high) if t.is_floating_point() else t for k, t in sets[0].items()}
            for name in wrt:
                raised[name].requires_grad_(case.direction != "forward")
            like = {k: g.to(high) for k, g in gradients.of(0, None).items()} if case.direction != "forward" else {}
            known["reference"] = _detached(_run(references[0], raised, case.direction, wrt, like))
            known["baselines"] = [
                _detached(_run(f, sets[0], case.direction, wrt, gradients.of(0, None))) for f in references
            ]
        summed = frozenset(f"grad {name}" for name in weights)
        slack = slack_of(variant)
        return check(_detached(out), known["reference"], known["baselines"], dtype, summed, slack)

    if case.direction != "forward":  # fixes the output gradients of every set before anything is measured
        for i, tensors in enumerate(sets):
            with torch.no_grad():
                gradients.of(i, references[0](tensors))
    variants = [_variant(candidate, sets, case.direction, wrt, gradients) for candidate in candidates]
    return Workload(len(sets), variants, work, verdict)


class _Gradients:
    """Output gradients per input set, the same for every candidate."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, Tensor]] = {}

    def of(self, i: int, outputs: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if i not in self.kept:
            if outputs is None:
                return {}
            self.kept[i] = {name: torch.randn_like(out) for name, out in outputs.items()}
        return self.kept[i]


def _generator(setting: Setting, seed: int) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator(setting.device).manual_seed(seed)


def _variant(
    candidate: Candidate,
    sets: list[dict[str, Tensor]],
    direction: str,
    wrt: Sequence[str],
    gradients: _Gradients,
) -> Variant:
    def prepare() -> Call:
        reason = candidate.why_not() if candidate.why_not else ""
        if reason:
            raise UnavailableError(reason)
        function = compiled_statically(candidate.function) if candidate.compiled else candidate.function
        if direction != "backward":
            return lambda i: _run(function, sets[i], direction, wrt, gradients.of(i, None))
        graphs = [function(tensors) for tensors in sets]

        def call(i: int) -> dict[str, Tensor]:
            return _gradients(graphs[i], sets[i], wrt, gradients.of(i, None), retain=True)

        return call

    describe = candidate.describe
    return Variant(
        candidate.name,
        candidate.kind,
        prepare,
        compiled=candidate.compiled,
        describe=None if describe is None else lambda: describe(sets[0]),
    )


def _run(
    function: Function, tensors: dict[str, Tensor], direction: str, wrt: Sequence[str], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if direction == "forward":
        with torch.no_grad():
            return function(tensors)
    outputs = function(tensors)
    found = _gradients(outputs, tensors, wrt, gradients, retain=False)
    return found if direction == "backward" else {**outputs, **found}


def _gradients(
    outputs: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    wrt: Sequence[str],
    gradients: Mapping[str, Tensor],
    *,
    retain: bool,
) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        list(outputs.values()),
        [tensors[name] for name in wrt],
        [gradients[name] for name in outputs],
        retain_graph=retain,
    )
    return {f"grad {name}": g for name, g in zip(wrt, found, strict=True)}


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in tensors.items()}
