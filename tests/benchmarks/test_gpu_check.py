"""How gpu_check runs its steps, with stand-ins for what only a GPU machine has."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.results import Results
from benchmarks.steps import run_step


def step_of(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a step as it would run on an H100."""
    found = {}

    def record(name: str, command: list[str], *, extra: dict[str, str], **_: Any) -> dict[str, Any]:
        found[name] = list(command), extra
        return {"name": name, "status": "ok", "returncode": 0}

    monkeypatch.setattr(gpu_check, "run_step", record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check = gpu_check.Check(tmp_path / "r.json", 400.0, gpu_check.STEPS, (), False, 0.1, True, time.monotonic())
    gpu_check._RUNNERS[name](check)
    return found[name]


def test_an_interrupted_step_tells_what_it_knew(tmp_path: Path) -> None:
    """As pytest does: what failed so far is printed on the interrupt that comes at the limit."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('two tests failed')"
    log = tmp_path / "new" / "r.log"
    step = run_step("slow", [sys.executable, "-c", code], limit_s=1.5, log_file=log)
    assert step["status"] == "timeout" and "two tests failed" in step["tail"]
    run_step("next", [sys.executable, "-c", "print('fine')"], limit_s=60, log_file=log)
    text = log.read_text()
    assert text.index("==== slow") < text.index("two tests failed") < text.index("==== timeout") < text.index("fine")


def test_a_step_that_does_not_listen_is_ended_with_its_children() -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=False)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    step = run_step("deaf", [sys.executable, "-c", code], limit_s=1.5)
    child = Path("/proc") / step["tail"].split()[0] / "stat"
    assert step["status"] == "timeout"
    for _ in range(100):  # the signal is sent; a busy machine takes it a moment later
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_the_build_wants_cuda_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "_CUDA_TOOLS", tools)
    extra = step_of("build", monkeypatch, tmp_path)[1]
    assert extra["TGQ_CUDA_ARCHS"] == "90a" and "TGQ_CUDA" not in extra
    nvcc = tools / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    extra = step_of("build", monkeypatch, tmp_path)[1]
    assert extra["TGQ_CUDA"] == "1" and extra["CUDACXX"] == str(nvcc)


def test_memcheck_leaves_out_what_records_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fnmatch import fnmatchcase

    from benchmarks.cases import cross_attention

    command, extra = step_of("memcheck", monkeypatch, tmp_path)
    assert extra["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    patterns = [value for flag, value in itertools.pairwise(command) if flag == "--variant"]
    chosen = [
        candidate
        for candidate in (
            *cross_attention.candidates(4, "cuda", compiled=False),
            *cross_attention.chunk_candidates(4, "cuda"),
        )
        if any(fnmatchcase(candidate.name, pattern) for pattern in patterns)
    ]
    assert {"tgq_fast", "tgq_fast fused triton"} <= {candidate.name for candidate in chosen}
    assert not any(isinstance(candidate.function, cross_attention._Graphed) for candidate in chosen)


def test_triton_gets_a_cache_that_it_can_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert gpu_check._writable_cache() == {}
    monkeypatch.setattr(gpu_check.os, "access", lambda path, mode: Path(path) != tmp_path)
    assert "tgq" in gpu_check._writable_cache()["TRITON_CACHE_DIR"]
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert gpu_check._writable_cache() == {}


@pytest.mark.parametrize(
    ("native", "said"),
    [
        ({"missing": "not built"}, "no CUDA: not built"),
        ({"cuda_reason": "no nvcc"}, "no CUDA: no nvcc"),
        ({"cuda_reason": "", "hopper_engine": False}, "no Hopper engine"),
        ({"cuda_reason": "", "hopper_engine": True}, None),
    ],
)
def test_the_summary_says_what_was_not_built(native: dict[str, Any], said: str | None) -> None:
    facts = {"device_name": "H100", "device": "cuda", "commit": "c", "capability": "9.0", "native": native}
    text = "\n".join(gpu_check.summary(Results(environment=facts)))
    assert said in text if said else "no " not in text
