"""Two builds by turns: ratios the right way round, every refusal told, and this checkout beside itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import builds
from benchmarks.builds_worker import Worker
from benchmarks.case import Variant, Workload
from benchmarks.ceilings import Work
from benchmarks.parity import Verdict

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(not list((ROOT / "tgq_fast").glob("_C*.so")), reason="no extension in this checkout")


class Side:
    """A build whose n-th sample takes `seconds(n)` per call, and that opens as told."""

    def __init__(self, seconds: Callable[[int], float], variants: dict[str, str | None], shape: int = 1) -> None:
        self.seconds, self.opened, self.samples = seconds, {"shape": {"N": shape}, "variants": variants}, 0

    def ask(self, line: str) -> str:
        verb, *arguments = json.loads(line)
        if verb == "open":
            return json.dumps(self.opened)
        self.samples += 1
        return json.dumps([self.seconds(self.samples - 1)] * arguments[1])


def compared(before: Any, now: Any, **renamed: str) -> list[dict[str, Any]]:
    return builds.compare(before, now, "case", rounds=5, sample_s=0.004, renamed=renamed)


def test_the_ratio_is_now_over_before_and_that_of_neighbours() -> None:
    (row,) = compared(Side(lambda _: 1e-3, {"ours": None}), Side(lambda _: 2e-3, {"ours": None}))
    assert (row["ratio"], row["before_ms"], row["now_ms"], row["rounds"]) == (2.0, 1.0, 2.0, 5)
    # The machine slows down threefold from round to round, for both: pairs see nothing of it.
    (row,) = compared(Side(lambda n: 1e-3 * 3**n, {"a": None}), Side(lambda n: 2e-3 * 3**n, {"a": None}))
    assert row["ratio_p20"] == row["ratio"] == row["ratio_p80"] == 2.0


def test_rows_without_times_say_why() -> None:
    fast = {"a": None, "b": "parity: off", "c": None, "old": None, "gone": None}
    rows = compared(
        Side(lambda _: 1e-3, fast),
        Side(lambda _: 1e-3, {"a": None, "b": None, "c": "ValueError: no", "new": None, "fresh": None}),
        old="new",
    )
    assert [(row["variant"], row.get("reason")) for row in rows] == [
        ("a", None), ("b", "parity: off"), ("c", "ValueError: no"), ("new", None),
    ]  # fmt: skip
    assert all(("ratio" in row) != ("reason" in row) for row in rows) and all(map(builds.line, rows))
    (row,) = compared(Side(lambda _: 1e-3, {"a": None}, shape=1), Side(lambda _: 1e-3, {"a": None}, shape=2))
    assert "other shapes" in row["reason"] and "ratio" not in row


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert builds.main([str(tmp_path)]) == 2
    assert "compiled extension" in capsys.readouterr().err


@built
def test_this_checkout_beside_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "builds.json"
    command = [str(ROOT), "--case", "streams/*/forward", "--rounds", "3", "--sample-s", "0", "--threads", "1"]
    assert builds.main([*command, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["rows"] and document["before"] == document["now"]
    for row in document["rows"]:
        assert 0.05 < row["ratio"] < 20, row
    # Cases that are not run again stay.
    document["rows"].append({"case": "another", "variant": "a", "reason": "kept"})
    file.write_text(json.dumps(document))
    assert builds.main([*command, "--json", str(file)]) == 0
    assert [row["case"] for row in json.loads(file.read_text())["rows"]].count("another") == 1
    assert builds.main([str(ROOT), "--case", "nothing"]) == 2
    assert "no case" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["", "parity", "raises"])
def test_a_variant_that_fails_gets_no_call(fault: str) -> None:
    def call(i: int) -> int:
        if fault == "raises":
            raise ValueError(f"set {i}")
        return i

    workload = Workload(1, (), Work(1, 1), lambda _, __: Verdict(fault != "parity", 9.0, "nine off"))
    worker = Worker(1)
    outcome = worker._prepare(workload, Variant("a", "ours", lambda: call))
    assert outcome == {"": None, "parity": "parity: nine off", "raises": "ValueError: set 0"}[fault]
    assert ("a" in worker.calls) == (fault == "")
