"""What this machine can run: versions, backends with reasons, build facts, and a one-line smoke test of each backend.

Every probe catches its own failure and reports it: a broken optional package must not hide the rest.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import tgq_fast
from tgq_fast import _native

__all__ = ["Check", "Diagnosis", "doctor"]

_PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy", "pyarrow", "pillow",
    "faiss-cpu", "faiss-gpu", "flash-attn",
)  # fmt: skip
_TOOLS = ("nvcc", "cmake", "gcc", "ninja")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        ok: it can be used here.
        detail: facts when it can, the reason when it cannot.
        required: the package cannot do its main job without it.
    """

    name: str
    ok: bool
    detail: str
    required: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """The whole report; `ok` is False when something required is missing."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    build: dict[str, Any]
    backends: list[Check] = field(default_factory=list)
    weights: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything required works."""
        return all(check.ok for check in (*self.backends, *self.weights) if check.required)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"ok": self.ok, **asdict(self)}


def doctor() -> Diagnosis:
    """Look at this machine; takes a few seconds and writes nothing."""
    from tgq_fast.defaults import plain_defaults

    with plain_defaults():
        return Diagnosis(
            machine=_machine(),
            versions={
                "tgq_fast": tgq_fast.__version__,
                "python": platform.python_version(),
                **{name: _version(name) for name in _PACKAGES},
            },
            build=_native.build_info() or {"missing": _native.why_missing()},
            backends=[
                _probe("torch", _torch, required=True),
                _probe("native search", _search),
                _probe("native inference", _inference),
                _probe("triton", _triton),
                _probe("cuda", _cuda),
                _probe("flash-attn", _flash_attention),
                _probe("faiss", _faiss),
            ],
            weights=_weights(),
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }
    for tool in _TOOLS:
        facts[tool] = _first_version_line(tool)
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _first_version_line(tool: str) -> str | None:
    path = shutil.which(tool)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    release = [line for line in lines if "release" in line]
    return (release or lines or [path])[0].strip()


def _probe(name: str, check: Callable[[], tuple[bool, str]], *, required: bool = False) -> Check:
    try:
        ok, detail = check()
    except Exception as error:  # a broken backend is a finding, whatever it raises
        ok, detail = False, f"{type(error).__name__}: {error}".splitlines()[0]
    return Check(name, ok, detail, required)


def _torch() -> tuple[bool, str]:
    import torch

    from tgq_fast.reference import hybrid_cross_attention  # noqa: F401

    value = float((torch.ones(4, 8) @ torch.ones(8, 4)).sum())
    return value == 128.0, f"product of ones is right, {torch.get_num_threads()} threads"


def _search() -> tuple[bool, str]:
    if not _native.available():
        return False, _native.why_missing() + "; search uses torch"
    import torch

    from tgq_fast.reference import exact_topk
    from tgq_fast.search import topk

    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-8, 8, (3, 16), generator=generator).float()
    pool = torch.randint(-8, 8, (50, 16), generator=generator).float()
    same = torch.equal(torch.as_tensor(topk(queries, pool, 5).indices), exact_topk(queries, pool, 5).indices)
    info = _native.build_info()
    return same, f"isa {info.get('isa', 'unknown')}; " + ("agrees with the reference" if same else "WRONG neighbours")


def _inference() -> tuple[bool, str]:
    import torch

    from tgq_fast.ops.matrix_unit import PackedLinear, why_not

    if reason := why_not(torch.float32):
        return False, f"{reason}; packed layers use oneDNN"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (40, 50), generator=generator).float()
    x = torch.randint(-8, 8, (3, 50), generator=generator).float()
    same = torch.equal(PackedLinear(weight)(x), x @ weight.T)
    return same, "AMX matrix unit, " + ("product of integers is right" if same else "WRONG product")


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    import torch

    if not torch.cuda.is_available():
        return False, "needs a CUDA device and torch sees none; operators use torch"
    from tgq_fast import ops, reference

    generator = torch.Generator(device="cuda").manual_seed(0)
    a, e = (torch.randn(8, 16, device="cuda", generator=generator) for _ in range(2))
    error = float((ops.redundancy_loss(a, e) - reference.redundancy_loss(a, e)).abs())
    return error < 1e-4, f"redundancy loss differs from the reference by {error:.1e}"


def _cuda() -> tuple[bool, str]:
    import torch

    if torch.version.cuda is None:
        return False, "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return False, f"torch is built for CUDA {torch.version.cuda} but sees no device"
    properties = torch.cuda.get_device_properties(0)
    ones = torch.ones(8, 8, device="cuda")
    works = float((ones @ ones).sum()) == 512.0
    return works, f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"


def _flash_attention() -> tuple[bool, str]:
    if importlib.util.find_spec("flash_attn") is None:
        return False, "not installed (extra [flash-attn], needs a CUDA device)"
    import torch

    if not torch.cuda.is_available():
        return False, "installed, but torch sees no CUDA device"
    flash_attn = importlib.import_module("flash_attn")
    x = torch.ones(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    return bool(torch.isfinite(flash_attn.flash_attn_func(x, x, x)).all()), f"version {flash_attn.__version__}"


def _faiss() -> tuple[bool, str]:
    if importlib.util.find_spec("faiss") is None:
        return False, "not installed (extra [faiss])"
    import numpy as np

    faiss = importlib.import_module("faiss")
    index = faiss.IndexFlatIP(4)
    index.add(np.eye(4, dtype=np.float32))
    _, nearest = index.search(np.eye(4, dtype=np.float32)[2:3], 1)
    return int(nearest[0, 0]) == 2, f"version {faiss.__version__}, finds a unit vector"


def _weights() -> list[Check]:
    from tgq_fast.models.backbones import BACKBONES

    checks = []
    for name, (packages, requirement) in BACKBONES.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        detail = f"missing: pip install {requirement}" if missing else "installed"
        checks.append(Check(name, not missing, detail))
    return checks
