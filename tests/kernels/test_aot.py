"""Every kernel, compiled ahead of time for GPUs that are not here; and no compilation per length.

The processes started here run Triton's compiler, not its interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernel tests need triton")

MATRIX_KERNELS = "absorbed_forward,fused_forward,absorbed_backward_rows,stream_forward,modulation_forward"


def run(*command: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check(*arguments: str) -> list[dict]:
    reports = [json.loads(line) for line in run("-m", "tgq_fast.kernels.aot", *arguments).splitlines()]
    assert reports
    broken = [(r["kernel"], r["arch"], r["row"], r["broken"]) for r in reports if r["broken"]]
    assert not broken, broken
    return reports


def test_kernels_of_the_paper_size() -> None:
    reports = check("--archs", "90", "--bits", "16", "--first", "--kernels", MATRIX_KERNELS)
    found = {report["kernel"]: report["matrix"] for report in reports}
    assert found["absorbed_forward"] == found["absorbed_backward_rows"] == "HGMMA"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("bits", ["16", "32"])
def test_every_shipped_row(arch: str, bits: str) -> None:
    check("--archs", arch, "--bits", bits)


def test_a_new_length_compiles_nothing() -> None:
    counts = json.loads(run(str(Path(__file__).with_name("count_variants.py"))))
    assert len(counts) == 16
    for kernel, count in counts.items():
        # Stream kernels run in two modes here; all else is one variant for 20 lengths.
        assert count == (2 if kernel.startswith("stream") else 1), (kernel, count)
