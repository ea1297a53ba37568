"""The figures of README.md are those of the committed result files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tgq_fast.errors import ArgumentError
from tgq_fast.report import readme
from tgq_fast.report.readme import fill, main, retrieval_table

ROOT = Path(__file__).parents[2]


def result(seed: int, value: float) -> dict[str, Any]:
    metric = {"value": value, "low": value - 0.01, "high": value + 0.01}
    names = ("HR@1", "HR@10", "HR@100", "H@100", "MRR")
    run = {"queries": 1200, "pool_size": 9000, "metrics": dict.fromkeys(names, metric)}
    return {
        "catalogue": "shop",
        "fields": ["category"],
        "command": "make demo CATALOG=shop",
        "seed": seed,
        "results": {"tgq": run},
    }


def test_one_seed_shows_its_interval_and_several_their_range() -> None:
    assert "| tgq | 0.500 [0.490, 0.510] |" in retrieval_table([("a.json", result(0, 0.5))])
    several = retrieval_table([("b.json", result(1, 0.7)), ("a.json", result(0, 0.5))])
    assert "| tgq | 0.600 [0.500, 0.700] |" in several and "seeds 0, 1" in several
    assert "`a.json`, `b.json`" in several


def study(verdict: str) -> dict[str, Any]:
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    metrics = {place: {"HR@1": cell, "H@10": cell} for place in ("clean", "all overlay", "all")}
    against = {place: {m: {"verdict": verdict} for m in cells} for place, cells in metrics.items()}
    return {
        "catalogue": "shop",
        "plan": {"fields": ["category"], "seeds": 3, "conditions": ["clean", "overlay:0.3:both"]},
        "test": {"queries": 1200, "groups": 300, "pool": 9000},
        "metrics": ["HR@1", "H@10"],
        "pooled": {"all": [], "all overlay": []},
        "main": "tgq",
        "rows": {
            "tgq": {"metrics": metrics, "facts": {"ablation": None}},
            "mlp": {"metrics": metrics, "facts": {"ablation": None}, "against": against},
        },
    }


def test_a_study_replaces_the_demos_of_its_catalogue_and_bolds_what_it_proves() -> None:
    files = [("s.json", study("win")), ("a.json", result(0, 0.7))]
    table = retrieval_table(files)
    assert "0.700" not in table and "`s.json`" in table
    assert "| tgq | **0.500 [0.400, 0.600]** | **0.5" in table and "| mlp | 0.500 [0.400, 0.600] |" in table
    assert "| HR@1 clean | H@10 clean | H@10 all overlay | H@10 all |" in table
    assert "**0.5" not in retrieval_table([("s.json", study("tie"))])


def test_an_ablation_shows_its_difference_and_floors_alone_prove_nothing() -> None:
    given = study("win")
    given["plan"]["ablations"] = ["gates"]
    rows = given["rows"]
    rows["without gates"] = {**rows["mlp"], "facts": {"ablation": "without gates"}}
    rows["mlp"]["facts"]["stage"] = "floor"
    table = retrieval_table([("s.json", given)])
    assert "| without gates | 0.500 [0.400, 0.600] ↓ |" in table and "**0.5" not in table and "↓ ↑: worse" in table


def test_a_document_without_a_place_is_refused() -> None:
    with pytest.raises(ArgumentError, match="retrieval:begin"):
        fill("nothing here", [])


def test_a_document_is_filled_in_place(tmp_path: Path) -> None:
    """Through a link, with the mode that it has."""
    (tmp_path / "results").mkdir()
    real, link = tmp_path / "real.md", tmp_path / "README.md"
    real.write_text("<!-- retrieval:begin -->\nold\n<!-- retrieval:end -->\n")
    real.chmod(0o600)
    link.symlink_to("real.md")
    assert main([str(link), str(tmp_path / "results")]) == 0
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o600 and "No result files yet" in real.read_text()


def test_a_result_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"serving\.json without a catalogue"):
        retrieval_table([("serving.json", {"answers_per_second": 900})])


def paths(value: object, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [at, *(p for k, v in value.items() for p in paths(v, (*at, k)))] if isinstance(value, dict) else [at]


@pytest.mark.parametrize("whole", [result(0, 0.5), study("win")], ids=["demo", "study"])
@pytest.mark.parametrize("harm", ["gone", "number", "empty", "list"])
def test_damage_anywhere_in_a_result_is_refused_by_name_or_harmless(whole: dict[str, Any], harm: str) -> None:
    """Checked by name: an error of any other type is one of the program."""
    refused = 0
    for at in paths(whole)[1:]:
        broken = copy.deepcopy(whole)
        inner = broken
        for key in at[:-1]:
            inner = inner[key]
        if harm == "gone":
            del inner[at[-1]]
        else:
            inner[at[-1]] = {"number": 7, "empty": {}, "list": [["x"]]}[harm]
        try:
            retrieval_table([("x.json", broken)])
        except ArgumentError as error:
            refused += 1
            assert str(error).startswith("result files: got x.json")
    assert refused > 10


def test_a_mistake_of_the_program_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result(0, 0.5)))
    monkeypatch.setattr(readme, "_cell", lambda values: values["mistake"])
    with pytest.raises(TypeError):
        fill("<!-- retrieval:begin -->\n<!-- retrieval:end -->", [tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("document", "folder"), [("README.md", "docs/results"), ("docs/evaluation.md", "docs/results/further")]
)
def test_documents_show_exactly_the_committed_results(
    document: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / "README.md").is_file():
        pytest.skip("no source tree")
    monkeypatch.chdir(ROOT)
    text = Path(document).read_text(encoding="utf-8")
    assert fill(text, sorted(Path(folder).glob("*.json"))) == text
