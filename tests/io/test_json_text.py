"""JSON: one reader, whose errors are ValueErrors, and to which a repeated key is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tgq_fast.app.cli.options import assignments
from tgq_fast.data import Catalog, RejectLog
from tgq_fast.errors import ArgumentError, CatalogError, CheckpointError, PoolError, TGQError
from tgq_fast.io.json_text import MAX_DEPTH, read_json
from tgq_fast.io.sealed import seal, unseal
from tgq_fast.kernels import tiling
from tgq_fast.models.card import read_run
from tgq_fast.models.checkpoint import load_config
from tgq_fast.models.picture_reuse import is_of
from tgq_fast.pool import ItemPool
from tgq_fast.scale.attempts import Attempts
from tgq_fast.study.worker import finished
from tgq_fast.training.folder import read_manifest

DEEP = b"[" * 100_000
TWICE = b'{"a": 1, "b": {"c": 1, "c": 1}}'


BAD = [DEEP, DEEP + b"]" * 100_000, b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), TWICE, TWICE.decode()]
BAD += ["", "{", "{} {}", "NaNs", b"\xff", '"\x00"', "1" * 5_000]


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:12]))
def test_whatever_is_wrong_is_a_value_error(text: bytes | str) -> None:
    with pytest.raises(ValueError):
        read_json(text)


def test_what_is_right_is_as_python_reads_it() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    wide = json.dumps([{"a": [n, {"b": [None]}]} for n in range(500)])
    for text in (deep, wide, '{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}', "1e5", '"[[[["', "NaN", ' {"\\u0061": 1}\n'):
        assert repr(read_json(text)) == repr(json.loads(text)) == repr(read_json(text.encode()))
    assert read_json(b"\xef\xbb\xbf{}") == {}
    assert unseal(read_json(json.dumps(seal({"a": read_json(deep[1:-1])})))) == {"a": read_json(deep[1:-1])}
    with pytest.raises(TypeError):
        read_json(3)  # type: ignore[arg-type]


READERS: list[tuple[str, Callable[[Path], Any], object]] = [
    ("run.json", lambda folder: read_run(folder), CheckpointError),
    ("run.json", lambda folder: read_manifest(folder), CheckpointError),
    ("config.json", lambda folder: load_config(folder), CheckpointError),
    ("manifest.json", lambda folder: ItemPool.open(folder), PoolError),
    ("manifest.json", lambda folder: is_of(folder / "manifest.json", "tower", 3), False),
    ("result.json", lambda folder: finished(folder, None), None),  # type: ignore[arg-type]
    ("rejects.jsonl", lambda folder: list(RejectLog(folder / "rejects.jsonl")), []),
    ("attempts.jsonl", lambda folder: Attempts(folder / "attempts.jsonl").refused, {}),
]


@pytest.mark.parametrize(("name", "read", "answer"), READERS, ids=[f"{n} {a}" for n, _, a in READERS])
@pytest.mark.parametrize("data", [DEEP, TWICE, b'{"facts": {}, "facts": {"tower": "tower", "rows": 3}}'])
def test_files_of_ours_with_bad_json_are_refused(
    tmp_path: Path, name: str, read: Callable[[Path], Any], answer: object, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    if isinstance(answer, type) and issubclass(answer, TGQError):
        with pytest.raises(answer):
            read(tmp_path)
    else:
        assert read(tmp_path) == answer


def test_a_table_of_tiles_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGQ_TILES", str(tmp_path))
    for number, data in enumerate((DEEP, TWICE, b"[]", b"\xff")):
        (tmp_path / f"gpu{number}.json").write_bytes(data)
        with pytest.raises(ArgumentError, match=rf"TGQ_TILES.*gpu{number}\.json"):
            tiling.table(f"gpu{number}")


def test_settings_that_are_no_json_are_texts() -> None:
    assert assignments([f"a={'[' * 5_000}", f"b={'1' * 5_000}", "c=[1]"], "--set", parse=True) == {
        "a": "[" * 5_000,
        "b": "1" * 5_000,
        "c": [1],
    }


# A thousand rows around the bad ones: most rows are parsed many at a time.
def rows_around(*bad: str) -> str:
    good = [json.dumps({"id": f"i{n}", "title": 'Stand 4" : oak', "attributes": {"k": ":"}}) for n in range(1000)]
    good[500:500] = bad
    return "\n".join(good) + "\n"


@pytest.mark.parametrize(
    "bad",
    [
        '{"id": "x", "title": "A", "title": "B"}',
        '{"id": "x", "id": "x"}',
        '{"id": "x", "attributes": {"colour": "red", "colour": "blue"}}',
        '{"id": "x", "\\u0069d": "y"}',
        '{"id": "x", "attributes": {"k": "1", "k ": "2"}}',
        '{"id": "x", "attributes": {"k": "1"}, "attributes.k": "2"}',
        '{"id": "x", "attributes": {"k": "1"}, "Attributes.k": "2", "attributes.k": "2"}',
        '{"id": "x", "attributes": "{\\"k\\": 1, \\"k\\": 2}"}',
        '{"id": "x", "more": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
    ],
)
def test_a_row_that_says_a_thing_twice_is_a_problem_of_its_own(tmp_path: Path, bad: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(rows_around(bad))
    with pytest.raises(CatalogError) as error:
        Catalog.load(tmp_path)
    (problem,) = error.value.problems
    assert problem.startswith("row 501: ") and ("twice" in problem or "within each other" in problem)
    assert len(Catalog.load(tmp_path, policy="skip")) == 1000


def test_a_pair_that_says_a_thing_twice_is_a_problem_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(rows_around())
    pairs = [json.dumps({"query": f"i{n}", "target": f"i{n + 1}"}) for n in range(900)]
    pairs[300:300] = ['{"query": "i3", "target": "i4", "target": "i9"}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    with pytest.raises(CatalogError) as error:
        Catalog.load(tmp_path)
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith("pairs row 301: ")
    assert "'target' stands twice" in error.value.problems[0]


def test_an_attribute_in_two_places_of_which_one_is_blank_is_that_of_the_other(tmp_path: Path) -> None:
    given = {"id": "a", "attributes": {"k": "1", "m": None}, "attributes.k": None, "attributes.m": "2"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(given) + "\n")
    assert Catalog.load(tmp_path).items[0].attributes == {"k": "1", "m": "2"}


def test_a_map_with_a_key_twice_is_a_problem_of_its_row(tmp_path: Path) -> None:
    pairs = [[("k", "1")], [("k", "1"), ("k", "2")]]
    table = pa.table({"id": ["a", "b"], "attributes": pa.array(pairs, pa.map_(pa.string(), pa.string()))})
    pq.write_table(table, tmp_path / "metadata.parquet")
    with pytest.raises(CatalogError, match="row 2: attributes has a key twice"):
        Catalog.load(tmp_path)
