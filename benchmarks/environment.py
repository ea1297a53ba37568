"""Facts of the machine, the software and the source that every result file carries."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tgq_fast.io.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "faiss-gpu-cuvs",
    "flash-attn",
    "usearch",
    "tgq-fast",
)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit(checkout: Path = ROOT) -> str:
    """The source commit, with `+` when tracked files differ from it; "unknown" outside a checkout."""
    found = _output("git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD")
    if not found:
        return os.environ.get("TGQ_COMMIT", "unknown")
    changed = _output(
        "git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"
    )
    return found + ("+" if changed else "")


def cpu_name() -> str:
    """Model name of the processor with its core count, e.g. "Intel(R) Xeon(R) Processor, 2 cores"."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {usable_cores()} cores"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Installed versions of torch and of every peer that is there."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def slug(name: str) -> str:
    """A device name as a folder name: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def command_line() -> str:
    """This process' own, with absolute paths by their last name: where one machine keeps its files says nothing."""
    given = [Path(one).name if os.path.isabs(one) else one for one in sys.argv[1:]]
    return " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *given])


def write_figures(path: Path, **figures: Any) -> None:
    """Write a benchmark's figures beside what they were taken with."""
    facts = {
        "command": command_line(),
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "versions": versions(),
    }
    write_atomic(path, (json.dumps(facts | figures, indent=1) + "\n").encode())


def environment(device: str, threads: int, command: list[str] | None = None) -> dict[str, Any]:
    """What a result file says about where it comes from.

    Args:
        device: "cpu" or "cuda".
        threads: threads that torch and the peers use on the CPU.
        command: the command line; default: this process' own.
    """
    from tgq_fast import _native

    facts: dict[str, Any] = {
        "device": device,
        "device_name": cpu_name(),
        "cpu": cpu_name(),
        "threads": threads,
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "versions": versions(),
        "torch_cuda": torch.version.cuda,
        "native": _native.build_info() or {"missing": _native.why_missing()},
        "commit": commit(),
        "command": command_line() if command is None else " ".join(command),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device_name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "device_memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
            "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        }
    return facts


def default_result_path(facts: dict[str, Any]) -> Path:
    """benchmarks/results/<device>/<date>-<commit>.json."""
    name = f"{facts['started'][:10]}-{facts['commit'].replace('+', '-dirty')}.json"
    return ROOT / "benchmarks" / "results" / slug(facts["device_name"]) / name
