"""Another checkout as a variant: its own package is loaded, with the same answers, and it times itself."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch

from benchmarks.case import UnavailableError
from benchmarks.cases.other_build import OtherBuild
from benchmarks.checkout_process import CheckoutProcess
from benchmarks.timing import measure
from tgq_fast.search import topk

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(not list((ROOT / "tgq_fast").glob("_C*.so")), reason="no extension in this checkout")


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codes", [False, True])
def test_answers_of_another_checkout(dtype: torch.dtype, codes: bool) -> None:
    pool = torch.randn(3000, 40).to(dtype)
    sets = [torch.randn(7, 40).to(dtype) for _ in range(3)]
    other = OtherBuild(ROOT, pool, sets, 5, 1, codes)
    for i in (2, 0, 1):
        assert torch.equal(other(i), topk(sets[i], pool, 5).indices)
    assert "sources" in other.facts and "extension" in other.facts
    begin = time.perf_counter()
    seconds = other.timed(0, 20)
    assert 0 < seconds < time.perf_counter() - begin
    process = other._other._process
    del other
    gc.collect()
    assert process.poll() == 0


@built
def test_self_join_and_timing() -> None:
    pool = torch.randn(200, 16)
    other = OtherBuild(ROOT, pool, [pool], 4, 1, False)
    assert torch.equal(other(0), topk(pool, pool, 4).indices)

    def slow(i: int) -> None:
        time.sleep(0.005)

    slow.timed = lambda first, count: 7e-3 * count  # type: ignore[attr-defined]
    found = measure({"other": other, "own clock": slow}, sets=1, device="cpu", budget_s=0.05)
    assert found["own clock"].median_ms == pytest.approx(7.0) and found["other"].median_ms > 0


@built
def test_a_process_that_ended_is_no_result(tmp_path: Path) -> None:
    other = OtherBuild(ROOT, torch.randn(50, 16), [torch.randn(2, 16)], 4, 1, False)
    other._other._process.kill()
    other._other._process.wait()
    with pytest.raises(UnavailableError, match="ended"):
        other(0)
    with pytest.raises(UnavailableError, match="compiled extension"):
        OtherBuild(tmp_path, torch.randn(50, 16), [torch.randn(2, 16)], 4, 1, False)


def test_a_checkout_gets_no_modules_of_this_one(tmp_path: Path) -> None:
    """Which an editable install of this one would lend it."""
    package = tmp_path / "tgq_fast"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.so").touch()
    script = tmp_path / "script.py"
    script.write_text(
        "from __future__ import annotations\n"
        "import importlib.util, sys\nfrom pathlib import Path\nimport tgq_fast\n"
        "print('ready 0', Path(tgq_fast.__file__).parent, flush=True)\n"
        "for line in sys.stdin:\n    print(importlib.util.find_spec(line.strip()), flush=True)\n"
    )
    process = CheckoutProcess(tmp_path, script)
    assert process.ask("tgq_fast.search") == "None"
    assert "ModuleSpec" in process.ask("json")
