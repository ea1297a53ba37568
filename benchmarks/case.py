"""What a case is: an operator at a shape class, dtype and direction, with all its peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.ceilings import Work
from benchmarks.parity import Verdict

Direction = Literal["forward", "backward", "full"]
Kind = Literal["ours", "before", "reference", "peer", "ceiling"]
Call = Callable[[int], Any]


class UnavailableError(RuntimeError):
    """A case or variant cannot run here for a reason that is no fault: a missing package, device or data file."""


@dataclass(frozen=True)
class Setting:
    """How this run wants its cases.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads for torch and for peers that have a setting of their own.
        tiny: replace every shape by its small stand-in, to try the plumbing.
        compile: whether variants that go through torch.compile run.
        check_only: check every variant and time none.
        variants: shell globs; only variants that match one run. Empty: all.
        embeddings: an item pool folder or .npy file [n, D] of real embeddings, or None.
        against: another checkout of this package, with its extension built, to compare with; or None.
    """

    device: str = "cpu"
    threads: int = 2
    tiny: bool = False
    compile: bool = True
    check_only: bool = False
    variants: tuple[str, ...] = ()
    embeddings: Path | None = None
    against: Path | None = None


@dataclass
class Variant:
    """One way to do a case's job.

    Attributes:
        kind: "ours", "before" (ours, of another checkout), "reference" (the definition, run eagerly), "peer", or
            "ceiling" (does less than the job; never counted as a peer).
        prepare: does what is not timed (compile, build an index) and returns the timed call, which takes the number of
            an input set. Raises UnavailableError where the variant cannot run.
        compiled: goes through torch.compile.
        describe: what the row should say about the choices made (backend, form), asked after the first call.
        work: its own, where it is not the case's.
    """

    name: str
    kind: Kind
    prepare: Callable[[], Call]
    compiled: bool = False
    describe: Callable[[], str] | None = None
    work: Work | None = None


@dataclass
class Workload:
    """What a case's builder hands to the runner.

    Attributes:
        sets: number of input sets that calls may rotate over.
        check: (variant, result of the call on set 0) → verdict. Not asked for ceilings.
    """

    sets: int
    variants: Sequence[Variant]
    work: Work
    check: Callable[[Variant, Any], Verdict]


@dataclass(frozen=True)
class Case:
    """One row group of the benchmark.

    Attributes:
        shape: the sizes, by their symbols; `tiny` replaces some of them in a run that only tries the plumbing.
        devices: where the case belongs.
        priority: lower runs first, so that a short budget spends itself on what matters.
        build: (case, sizes, setting) → workload.
    """

    op: str
    shape_class: str
    dtype: str
    direction: Direction
    shape: Mapping[str, Any]
    tiny: Mapping[str, Any]
    devices: frozenset[str]
    build: Callable[[Case, dict[str, Any], Setting], Workload] = field(compare=False)
    priority: int = 5

    @property
    def name(self) -> str:
        return f"{self.op}/{self.shape_class}/{self.dtype}/{self.direction}"

    def sizes(self, setting: Setting) -> dict[str, Any]:
        return {**self.shape, **self.tiny} if setting.tiny else dict(self.shape)
