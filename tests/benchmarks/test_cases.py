"""Every registered case runs over its small shapes and passes parity; the commands work from end to end."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, run
from benchmarks.case import Setting
from benchmarks.registry import EVERY, cases, distinct
from benchmarks.runner import run_case
from benchmarks.steps import run_step

OPS = ("attention", "connector", "info_nce", "modulation", "pipeline", "redundancy", "streams", "topk")


def test_every_operator_has_cases_for_both_devices() -> None:
    for device in ("cpu", "cuda"):
        assert {case.op for case in cases(device)} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_cases_pass_parity_on_small_shapes(op: str) -> None:
    setting = Setting(device="cpu", threads=1, tiny=True, compile=False, check_only=True)
    seen = set()
    for case in cases(None, [op]):
        # Over small shapes, cases that differ in size only are the same case.
        key = case.dtype, case.direction, tuple(sorted(case.sizes(setting).items()))
        if key in seen:
            continue
        seen.add(key)
        rows = run_case(case, setting, {})
        assert any(row["variant"] == "tgq_fast" for row in rows), case.name
        wrong = [row for row in rows if row["status"] not in ("ok", "skipped")]
        assert not wrong, f"{case.name}: {wrong}"
        assert [row["status"] for row in rows if row["variant"] == "tgq_fast"] == ["ok"], rows


def test_selection() -> None:
    assert {case.op for case in cases("cpu", ["topk"])} == {"topk"}
    assert {case.name for case in cases("cpu", ["topk/q1-n200k-*"])} == {
        "topk/q1-n200k-d256/float32/forward",
        "topk/q1-n200k-d768/float32/forward",
    }
    priorities = [case.priority for case in cases("cuda")]
    assert priorities == sorted(priorities)
    with pytest.raises(LookupError, match="no case matches 'nothing'"):
        cases("cpu", ["nothing"])


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="two benchmark cases"):
        distinct([*EVERY, EVERY[0]])


def test_chunk_sizes_are_variants_of_one_result() -> None:
    import torch

    from benchmarks.cases import cross_attention

    torch.manual_seed(0)
    sizes = {"B": 3, "N": 4, "L": 9, "d": 16, "dv": 12}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = cross_attention._inputs(sizes, torch.float32, device, torch.Generator(device).manual_seed(0))
    known = cross_attention._reference(tensors, heads=2, form="absorbed")
    by_name = {candidate.name: candidate.function for candidate in cross_attention.chunk_candidates(2, device)}
    assert sum(name.endswith("graph") for name in by_name) == len(by_name) // 2
    for name in ("tgq_fast", "tgq_fast, 8 MiB"):
        found = by_name[name](tensors)
        torch.testing.assert_close(found["exploratory"], known["exploratory"])


def test_time_is_kept_for_the_steps_to_come() -> None:
    check = gpu_check.Check(Path(), 400.0, gpu_check.STEPS, (), True, 0.0, False, time.monotonic())
    assert check.limit("tests") == pytest.approx(120)
    assert check.limit("registry") == pytest.approx(360, abs=1)  # a tenth is for tuning
    late = dataclasses.replace(check, begin=time.monotonic() - 380)
    assert late.limit("memcheck") == 1 and late.limit("tune") == pytest.approx(20, abs=1)


def test_wrong_usage_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--case", "nothing"]) == 2
    assert "no case matches" in capsys.readouterr().err
    assert gpu_check.main(["--only", "nothing", "--dry-run"]) == 2


def test_a_budget_that_is_spent_leaves_a_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = ["--device", "cpu", "--tiny", "--threads", "1", "--sample-s", "0", "--budget-s", "1e-9"]
    assert run.main([*arguments, "--case", "redundancy", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["complete"] is False and found["rows"] == []
    assert found["steps"][0]["not_run"] == [case.name for case in cases(None, ["redundancy"])]


def test_steps_end_at_their_limit() -> None:
    step = run_step("endless", [sys.executable, "-c", "print('begun', flush=True)\nwhile True: pass"], limit_s=1.5)
    assert step["status"] == "timeout" and step["seconds"] < 10 and step["returncode"] is None
    assert run_step("fails", [sys.executable, "-c", "raise SystemExit('why')"], limit_s=60)["tail"].strip() == "why"
    assert run_step("absent", ["no-such-program"], limit_s=1)["status"] == "skipped"


def test_gpu_check_dry_run_writes_one_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "check.json"
    arguments = ["--dry-run", "--only", "build,memcheck,registry,tune", "--case", "redundancy/b4096/*/forward"]
    assert gpu_check.main([*arguments, "--threads", "1", "--budget-s", "100000", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["complete"] is True and found["environment"]["tiny"] is True
    assert [(step["name"], step["status"]) for step in found["steps"]] == [
        ("build", "ok"),
        ("memcheck", "ok"),
        ("registry", "ok"),
        ("tune", "ok"),
    ]
    assert {row["variant"] for row in found["rows"]} == {"tgq_fast", "reference"}
    assert all("median_ms" in row for row in found["rows"]) and found["ceilings"]["copy_bytes_s"] > 0
    assert capsys.readouterr().out.rstrip().endswith(str(path))
