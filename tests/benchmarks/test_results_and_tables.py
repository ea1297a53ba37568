"""Result files survive faults, and tables say what the files say."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environment, plot, scale_engines, scale_sizes, tables, targets
from benchmarks.registry import cases
from benchmarks.results import ResultFileError, Results, result_files
from tgq_fast.errors import StorageError
from tgq_fast.io import files as io_files

CASE = "topk/q256-n200k-d256/float32/forward"


def row(variant: str, kind: str, ms: float | None, status: str = "ok", case: str = CASE, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "case": case,
        "op": case.split("/")[0],
        "variant": variant,
        "kind": kind,
        "status": status,
        **more,
    }
    if ms is not None:
        found |= {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "gb_s": 1.0, "tflop_s": 2.0, "floor_share": 0.5}
        found |= {"bound": "bytes", "peak_bytes": 3 << 20, "samples": 5, "timer": "wall", "floor_ms": ms / 2}
    return found


def document(*rows: dict[str, Any], **environment: Any) -> Results:
    facts = {
        "device": "cpu",
        "device_name": "Some CPU, 2 cores",
        "commit": "abc",
        "command": "python -m benchmarks.run",
        "threads": 2,
        "started": "2026-01-01T00:00:00+00:00",
        "versions": {"torch": "2.13"},
        **environment,
    }
    found = Results(environment=facts, ceilings={"copy_bytes_s": 1e10, "float32_flop_s": 5e11}, complete=True)
    for each in rows:
        found.add(each)
    return found


ROWS = (
    row("tgq_fast", "ours", 10.0),
    row("GEMM only", "ceiling", 5.0),
    row("torch mm + topk", "peer", 30.0),
    row("faiss-cpu flat, tuned", "peer", 20.0),
    row("numpy argpartition", "peer", None, "parity", reason="true scores fall short"),
)


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    document(*ROWS).save(path)
    assert vars(Results.load(path)) == vars(document(*ROWS))
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_fault_while_saving_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    document(ROWS[0]).save(path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(io_files.os, "fsync", fail)
    for write in (lambda: document(*ROWS).save(path), lambda: environment.write_figures(path, answers=3)):
        with pytest.raises(StorageError, match="disk full"):
            write()
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_what_benchmarks_write_stays_a_link_with_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to("real")
    text = "a\n<!-- table:nothing -->\n"
    for write in (
        lambda: document(*ROWS).save(link),
        lambda: environment.write_figures(link, answers=3),
        lambda: tables.main(["--results", str(tmp_path), str(link)]),
    ):
        real.write_text(text)
        real.chmod(0o600)
        write()
        assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_not_a_number_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    document(row("tgq_fast", "ours", 1.0, parity={"error": float("inf")})).save(path)
    assert json.loads(path.read_text())["rows"][0]["parity"] == {"error": None}


def test_a_later_row_replaces_an_earlier_one() -> None:
    found = document(row("tgq_fast", "ours", 1.0), row("tgq_fast", "ours", 2.0))
    assert [r["median_ms"] for r in found.rows] == [2.0]


@pytest.mark.parametrize("status", ["parity", "failed", "skipped"])
def test_a_row_that_did_not_pass_cannot_carry_a_speed(status: str, tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match="must carry no speed"):
        document(row("tgq_fast", "ours", 1.0, status))
    path = tmp_path / "r.json"
    document(row("tgq_fast", "ours", 1.0)).save(path)
    path.write_text(path.read_text().replace('"status": "ok"', f'"status": "{status}"'))
    with pytest.raises(ResultFileError, match="must carry no speed"):
        Results.load(path)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}', "{"])
def test_foreign_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ResultFileError):
        Results.load(path)


def test_the_newest_complete_file_of_each_device_counts(tmp_path: Path) -> None:
    document(started="2026-01-01").save(tmp_path / "a" / "1.json")
    document(started="2026-01-02").save(tmp_path / "a" / "2.json")
    partial = document(started="2026-01-03")
    partial.complete = False
    partial.save(tmp_path / "a" / "3.json")
    document(started="2026-01-04", tiny=True).save(tmp_path / "a" / "4.json")
    partial.save(tmp_path / "b" / "1.json")
    assert [path.relative_to(tmp_path).as_posix() for path, _ in result_files(tmp_path)] == ["a/2.json", "b/1.json"]


def test_an_older_file_counts_for_the_cases_that_the_newer_lacks(tmp_path: Path) -> None:
    ours = row("tgq_fast", "ours", 1.0)
    document(ours, {**ours, "case": "topk/other/float32/forward"}, started="2026-01-01").save(tmp_path / "a" / "1.json")
    document({**ours, "median_ms": 2.0}, started="2026-01-02").save(tmp_path / "a" / "2.json")
    found = {path.name: [(r["case"], r["median_ms"]) for r in results.rows] for path, results in result_files(tmp_path)}
    assert found == {"1.json": [("topk/other/float32/forward", 1.0)], "2.json": [(CASE, 2.0)]}


def files(*rows: dict[str, Any]) -> list[tuple[Path, Results]]:
    return [(Path("cpu/1.json"), document(*rows))]


def test_figures_compare_with_the_fastest_peer() -> None:
    text = tables.table("figures", files(*ROWS))
    assert (
        "| Some CPU, 2 cores | `topk/q256-n200k-d256/float32/forward` | 10 ms | 20 ms, faiss-cpu flat, tuned | 2.00× |"
        in text
    )


def test_a_peer_that_wins_is_shown() -> None:
    text = tables.table("figures", files(row("tgq_fast", "ours", 10.0), row("torch mm + topk", "peer", 4.0)))
    assert "4 ms, torch mm + topk | 0.40× |" in text


def test_operator_table_shows_every_row_and_no_speed_without_parity() -> None:
    lines = tables.table("benchmarks:cpu:topk", files(*ROWS)).splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(ROWS)
    (failed,) = [line for line in lines if "numpy" in line]
    assert "parity: true scores fall short" in failed and not any(c.isdigit() for c in failed)


def test_a_file_of_other_cases_is_left_out_of_a_table() -> None:
    other = {**row("tgq_fast", "ours", 10.0), "case": "losses/x/float32/forward", "op": "losses"}
    both = [*files(*ROWS), *files(other)]
    assert tables.table("benchmarks:cpu:topk", both) == tables.table("benchmarks:cpu:topk", files(*ROWS))
    lines = tables.table("benchmarks:cpu:targets", both).splitlines()
    assert sum(CASE in line and "GEMM only" in line for line in lines) == 1


def test_targets_are_judged() -> None:
    lines = tables.table("benchmarks:cpu:targets", files(*ROWS)).splitlines()
    (gemm,) = [line for line in lines if CASE in line and "GEMM only" in line]
    assert gemm.endswith("| GEMM only | ≤ 0.50× of the time | 2.00× | missed |")
    (torch_line,) = [line for line in lines if CASE in line and "torch mm" in line]
    assert torch_line.endswith("| ≥ 1× faster | 3.00× | met |")
    assert any(line.endswith("|  | not measured |") for line in lines)


@pytest.mark.parametrize(
    ("at_most", "metric", "value"), [(False, "time", 3.0), (True, "time", 1 / 3), (False, "floor", 0.5)]
)
def test_target_values(at_most: bool, metric: Any, value: float) -> None:
    rows = [row("tgq_fast", "ours", 10.0), row("x", "peer", 30.0), row("y", "reference", 40.0)]
    target = targets.Target("cpu", CASE, targets.BEST_PEER, 1.0, at_most=at_most, metric=metric)
    assert targets._outcome(target, rows).value == pytest.approx(value)


def test_targets_name_cases_that_exist() -> None:
    names = {device: {case.name for case in cases(device)} for device in ("cpu", "cuda")}
    assert [t.case for t in targets.TARGETS if t.case not in names[t.device]] == []


def test_documents_are_filled_between_their_markers_only(tmp_path: Path) -> None:
    document(*ROWS).save(tmp_path / "results" / "cpu" / "1.json")
    text = (
        "before\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nafter <!-- other:begin -->kept<!-- other:end -->\n"
    )
    page = tmp_path / "page.md"
    page.write_text(text)
    command = ["--results", str(tmp_path / "results"), str(page)]
    assert tables.main(["--check", *command]) == 1 and page.read_text() == text
    assert tables.main(command) == 0
    filled = page.read_text()
    assert filled.startswith("before\n<!-- figures:begin -->\n| machine |") and "old" not in filled
    assert filled.endswith("<!-- figures:end -->\nafter <!-- other:begin -->kept<!-- other:end -->\n")
    assert tables.main(["--check", *command]) == 0


def test_without_results_the_tables_name_the_command() -> None:
    assert "python -m benchmarks.run" in tables.table("figures", [])
    assert "python -m benchmarks.gpu_check" in tables.table("benchmarks:gpu:topk", [])


def test_every_marker_of_the_documents_makes_a_table() -> None:
    for page in tables._DOCUMENTS:
        text = page.read_text()
        marked = re.findall(r"<!-- ((?:figures|benchmarks)[\w:]*):begin -->", text)
        assert [name for _, name, _ in tables._MARKER.findall(text)] == marked
        for name in marked:
            assert tables.table(name, [])


def test_plots(tmp_path: Path) -> None:
    document(*ROWS, row("tgq_fast", "ours", 1.0, case="streams/a/float32/forward")).save(
        tmp_path / "r" / "cpu" / "1.json"
    )
    assert plot.main(["--results", str(tmp_path / "r"), "--out", str(tmp_path / "f")]) == 0
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [
        "some-cpu-2-cores-streams-abc.svg",
        "some-cpu-2-cores-topk-abc.svg",
    ]
    assert not plot.plot_operator(document(ROWS[4]), "topk", tmp_path / "none.svg")


def test_the_scaling_page_is_what_its_result_file_gives() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    document = json.loads((root / "docs" / "results" / "scale" / "sizes.json").read_text(encoding="utf-8"))
    assert text.count("<!-- scale:begin -->") == 1 and scale_sizes.fill(text, document) == text
    assert {entry["case"] for entry in document["results"]} == set(scale_sizes.CASES)
    engines = json.loads((root / "docs" / "results" / "scale" / "engines.json").read_text(encoding="utf-8"))
    assert text.count("<!-- engines:begin -->") == 1
    assert scale_sizes.filled(text, "engines", scale_engines.table(engines)) == text
    assert engines["ratios"] == scale_engines.ratios(engines["runs"])

    losses = json.loads((root / "docs" / "results" / "scale" / "losses.json").read_text(encoding="utf-8"))
    assert all(found["same"] and not found["not_lost"] and found["exit"] == 0 for found in losses["scenarios"])
    assert max(len(found["lost"]) for found in losses["scenarios"]) == 20
