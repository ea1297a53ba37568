"""The command line end to end on a miniature catalogue with tiny random towers, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_world import World, call
from typer.testing import CliRunner

from tgq_fast.app import cli, console, intake
from tgq_fast.app.cli.options import assignments, names
from tgq_fast.errors import ArgumentError
from tgq_fast.models import CONNECTORS


def test_names_with_commas_and_equals_signs() -> None:
    assert names('category,"size, EU", "a ""b"""') == ["category", "size, EU", 'a "b"']
    assert assignments(['"a=b"=c=d', "x=y=z"], "--field") == {"a=b": "c=d", "x": "y=z"}
    with pytest.raises(ArgumentError, match='"a=b"=value'):
        assignments(["nothing"], "--field")


def test_a_shell_completes_verbs_and_options() -> None:
    def completed(words: str) -> list[str]:
        given = {"_TGQ_FAST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(cli.app, [], env=given, prog_name="tgq-fast").output.split()

    assert completed("tgq-fast ne") == ["neighbours"]
    assert completed("tgq-fast embed --zero") == ["--zero-shot"]


def test_a_command_to_be_copied_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    line = "next: tgq-fast embed " + "long/" * 20 + "shop --out pools/first"
    console.note(line)
    assert line + "\n" == capsys.readouterr().err


def test_what_the_disk_says_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(intake, "validate_catalog", full)
    result = call("validate", tmp_path, "--json", code=2)
    assert "No space left" in result.stderr and "free some space" in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "StorageError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "CATALOG", "--out", "RUN", "--fields", "flavour"), "flavour"),
        (("train", "CATALOG", "--out", "RUN", "--connector", "tqg"), "tqg"),
        (("train", "CATALOG", "--out", "RUN", "--set", "hidden_sise=8"), "hidden_sise"),
        (("train", "CATALOG", "--out", "RUN", "--set", "hidden_size"), "name=value"),
        (("train", "CATALOG", "--out", "RUN", "--set", "connector=mlp"), "of their own"),
        (("train", "CATALOG", "--out", "RUN", "--vision", "/no/such/tower"), "/no/such/tower"),
        (("embed", "CATALOG", "--model", "/no/run", "--out", "POOL"), "no such run folder"),
        (("search", "/no/pool", "--item", "x"), "/no/pool"),
        (("search", "POOLED"), "--item ID or --image FILE"),
        (("search", "POOLED", "--item", "a", "--image", "b"), "--item ID or --image FILE"),
        (("search", "POOLED", "--item", "nobody"), "nobody"),
        (("search", "POOLED", "--item", "demo-0001", "--field", "category=mug"), "--field"),
        (("search", "POOLED", "--image", "x.jpg"), "--model"),
        (("search", "POOLED", "--image", "x.jpg", "--where", "category = same"), "a query by item"),
        (("search", "POOLED", "--item", "demo-0001", "--where", "flavour = red"), "flavour"),
        (("neighbours", "POOLED", "--out", "x.xlsx"), ".parquet"),
        (("duplicates", "POOLED", "--threshold", "nan"), "threshold"),
        (("evaluate", "CATALOG", "--model", "TRAINED", "--k", "ten"), "1,10,100"),
        (("evaluate", "CATALOG", "--model", "TRAINED", "--split", "tset"), "tset"),
        (("report", "CATALOG", "--model", "TRAINED", "--pool", "p", "--pool", "q", "--out", "r.html"), "2 pools"),
        (("import", "etsy", "CATALOG", "--out", "x"), "etsy"),
    ],
)
def test_wrong_input_is_one_clear_message_and_exit_2(
    world: World, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"CATALOG": world.catalog, "RUN": tmp_path / "run", "POOL": tmp_path / "pool"}
    places |= {"POOLED": world.pool, "TRAINED": world.run}
    result = call(*(places.get(argument, argument) for argument in arguments), code=2)
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_errors_under_json_are_one_document(world: World) -> None:
    result = call("search", world.pool, "--item", "nobody", "--json", code=2)
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ArgumentError" and error["exit_code"] == 2 and "nobody" in error["message"]


def test_unexpected_errors_and_interrupts_have_their_codes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(intake, "load_catalog", explode)
    result = call("embed", world.catalog, "--model", world.run, "--out", "p", code=1)
    assert "boom" in result.stderr and "--debug" in result.stderr and "Traceback" not in result.stderr
    assert "Traceback" in call("--debug", "embed", world.catalog, "--model", world.run, "--out", "p", code=1).stderr
    monkeypatch.setattr(intake, "load_catalog", interrupt)
    told = call("embed", world.catalog, "--model", world.run, "--out", "p", code=130).stderr
    assert "interrupted" in told and "--resume" not in told
    told = call("train", world.catalog, "--out", "r", code=130).stderr
    assert "interrupted" in told and "with --resume" in told  # without it that folder is refused


def test_every_verb_has_help_with_an_example() -> None:
    pools = ("search", "neighbours", "duplicates", "mine-negatives")
    for verb in ("validate", "train", "embed", *pools, "evaluate", "report", "import", "tune", "connectors", "doctor"):
        assert f"tgq-fast {verb}" in " ".join(call(verb, "--help").stdout.split())


def test_version_needs_no_verb() -> None:
    """It was printed only before a verb, and "Missing command" otherwise."""
    assert call("--version").stdout.startswith("tgq-fast ")


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from tgq_fast.app import cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tune_without_a_gpu_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("tune", "--out", tmp_path / "tiles", code=2)
    assert "no CUDA device" in result.stderr.replace("\n", " ") and not (tmp_path / "tiles").exists()


def test_tune_prints_what_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgq_fast.ops import tuning

    def run(out: Path, *, only: str, budget_s: float) -> dict:
        return {"table": out / "gpu.json", "gpu": "a gpu", "timed": {f"{only} 16": budget_s}}

    monkeypatch.setattr(tuning, "tune", run)
    options = ("tune", "--out", tmp_path, "--only", "fused*", "--budget-s", "5")
    assert json.loads(call(*options, "--json").stdout)["timed"] == {"fused* 16": 5.0}
    assert "fused* 16" in call(*options).stdout


def test_connectors_are_listed_at_one_budget() -> None:
    rows = {row["connector"]: row for row in json.loads(call("connectors", "--json").stdout)}
    budget = rows["tgq"]["parameters"]
    assert list(rows) == list(CONNECTORS) and not rows["text-only"]["macs"]
    assert all(abs(row["parameters"] / budget - 1) <= 0.01 for name, row in rows.items() if name != "text-only")
    assert "perceiver" in call("connectors").stdout
    more = json.loads(call("connectors", "--json", "--set", "num_visual_tokens=196").stdout)
    assert all(row["macs"] > rows[row["connector"]]["macs"] for row in more if row["connector"] != "text-only")
    call("connectors", "--set", "width=3", code=2)


def test_doctor_reports_backends_with_reasons() -> None:
    document = json.loads(call("doctor", "--json").stdout)
    backends = {check["name"]: check for check in document["backends"]}
    assert document["ok"] and backends["torch"]["ok"]
    assert all(check["detail"] for check in backends.values())
    assert "torch" in call("doctor").stdout


def test_exit_codes_are_documented() -> None:
    text = " ".join(call("--help").stdout.split())
    for code in (
        console.EXIT_OK,
        console.EXIT_INTERNAL,
        console.EXIT_USAGE,
        console.EXIT_DATA,
        console.EXIT_INTERRUPTED,
    ):
        assert f"{code} " in text


def test_ranks_above_zero_say_nothing_but_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tgq_fast.app import console

    def say() -> tuple[str, str]:
        console.note("a note")
        console.table("title", ("a",), [("b",)])
        console.print_json({"a": 1})
        with console.progress("working") as advance:
            advance(1, 2)
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    loud = say()
    assert "a note" in loud[1] and "title" in loud[0] and '"a": 1' in loud[0] and "working" in loud[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert say()[0] == loud[0]
    monkeypatch.setenv("RANK", "1")
    assert say() == ("", "")
    assert "no such" in call("embed", "/no/where", "--model", "/no/run", "--out", "/no/pool", code=3).stderr


def test_what_is_refused_before_it_begins_leaves_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from tgq_fast.app import console

    for moves in (0, 1):
        with pytest.raises(ValueError, match="no"), console.progress("working") as advance:
            for done in range(moves):
                advance(done, 2)
            raise ValueError("no")
        assert ("working" in capsys.readouterr().err) == bool(moves)
