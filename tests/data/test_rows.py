"""Streaming readers of the three table formats."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tgq_fast.data.items import RowError, parse_item
from tgq_fast.data.rows import read_json_lines, read_rows
from tgq_fast.errors import CatalogError


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_jsonl_keeps_line_numbers_and_goes_on_after_bad_lines(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"id": "a"}\n\n{broken\n[1]\n{"id": "\xff"}\n' + b"[" * 100_000 + b'\n{"id": "z"}'
    rows = list(read_rows(write(tmp_path / "m.jsonl", data)))
    assert [n for n, _ in rows] == [1, 3, 4, 5, 6, 7]
    assert rows[0][1] == {"id": "a"} and rows[-1][1] == {"id": "z"}
    reasons = [str(r) for _, r in rows[1:-1]]
    assert "JSON" in reasons[0] and "list" in reasons[1] and "UTF-8" in reasons[2] and "JSON" in reasons[3]


def test_overlong_lines_are_refused_without_holding_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgq_fast.data.rows.MAX_ROW_BYTES", 1 << 16)
    with open(tmp_path / "m.jsonl", "wb") as file:
        file.write(b'{"id": "')
        for _ in range(64):
            file.write(b"x" * (1 << 18))  # 16 MiB in one line
        file.write(b'"}\n{"id": "b"}\n')
    tracemalloc.start()
    rows = list(read_rows(tmp_path / "m.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(rows[0][1], RowError) and rows[1] == (2, {"id": "b"})
    assert peak < 4 << 20


PIECES = [
    b'{"a": 1}',
    b'{"a": 1},{"b": 2}',
    b'{"c": [1',
    b"2]}",
    b'"d": 2}',
    b'{"c": 1',
    b'{"e": "x',
    b'y"}',
    b"",
    b"7",
    b"[1]",
]
PIECES += [
    b"{}",
    b'{"f": {"g": null}}',
    b'{"a": NaN, "a": 2}',
    b' {"h": 3}\r',
    b'{"i": "\\ud800"}',
    b'{"j": "\xff"}',
    b"]",
    b"[",
]
PIECES += [b'{"k": "\xed\xa0\x80"}', b'{"l": 1} {"m": 2}', b'{"n": "\t"}', b"\xef\xbb\xbf{}", b",", b'"x"']
TWICE = [
    b'{"a":1, "a"\t:2}',
    b'{"a":1, "a"\r:2}',
    b'{"a": 1, "a" :2}',
    b'{"a":[{"x":1,"y":2,"\\u0078":3}]}',
    b'{"attributes": {"c": "1"\t, "d": ":", "c"\t:"2"}}',
    b'{"a\\\\":"\\":", "a\\\\" : 1}',
    b'{"a": {"b": 1}, "b": {"a": 2}, "c": "{[ \\": :", "d :": "\\\\"}',
    b'{"attributes": {"a": 1, "id": 2}, "id": "a\\\\\\":" ,"x":[[{}]]}',
    b'{"a":' + b"[" * 99 + b"]" * 99 + b"}",
    b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"a":' + b'"[" , "b":' * 100 + b"1}",
    b'{"a":[' + b"[]," * 200 + b"1]}",
]


def only_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Another definition of an object whose keys are distinct."""
    if sorted(set(key for key, _ in pairs)) != sorted(key for key, _ in pairs):
        raise ValueError
    return dict(pairs)


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, (dict, list)) + max(map(depth, inner), default=0)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES[:3] + PIECES), max_size=8) | st.lists(st.sampled_from(TWICE), max_size=3))
def test_json_lines_are_what_each_is_alone(lines: list[bytes]) -> None:
    """They are parsed many at a time: no line may take part in another's value."""
    first = [line.removeprefix(b"\xef\xbb\xbf") if not at else line for at, line in enumerate(lines)]
    wanted = []
    for number, line in enumerate(first, start=1):
        if line.strip():
            try:
                value = json.loads(line.decode(), object_pairs_hook=only_once)
                if depth(value) > 100:
                    raise ValueError
                wanted.append((number, repr(value) if isinstance(value, dict) else None))
            except ValueError:
                wanted.append((number, None))
    found = read_json_lines(io.BytesIO(b"\n".join(lines) + b"\n"))
    assert [(number, repr(row) if isinstance(row, dict) else None) for number, row in found] == wanted


def test_json_lines_before_damage_are_read() -> None:
    """Whatever ends the file: what came before it is not lost with the lines that are parsed at a time."""

    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            if not line:
                raise error
            return line

    for error in (EOFError("cut off"), OSError("no answer")):
        for count in (0, 3, 256, 300):
            seen = []
            with contextlib.suppress(OSError):
                for number, row in read_json_lines(Broken(b'{"a": 1}\n' * count)):
                    seen.append((number, isinstance(row, dict)))
            lost = [(count + 1, False)] if isinstance(error, EOFError) else []
            assert seen == [(number, True) for number in range(1, count + 1)] + lost


def test_csv_rows_quotes_and_wrong_field_counts(tmp_path: Path) -> None:
    text = 'id,title\na,"x, ""y""\nz"\nb\nc,1,2\n\nd,\n'
    rows = list(read_rows(write(tmp_path / "m.csv", b"\xef\xbb\xbf" + text.encode())))
    assert rows[0] == (1, {"id": "a", "title": 'x, "y"\nz'})
    assert isinstance(rows[1][1], RowError) and "1 fields" in str(rows[1][1])
    assert isinstance(rows[2][1], RowError) and rows[2][0] == 3
    assert rows[3] == (5, {"id": "d", "title": None})


def test_csv_with_a_megabyte_field_and_with_broken_utf8(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / "m.csv", b"id,title\na," + b"x" * 1_000_000 + b"\nb,\xff\xfe\n")))
    assert len(rows[0][1]["title"]) == 1_000_000  # type: ignore[index]
    assert isinstance(rows[1][1], RowError) and "UTF-8" in str(rows[1][1])


STRAY = [
    ("never closed", 'id,title\na,"Canvas sneaker\n' + "".join(f"i{n},Item {n}\n" for n in range(50)), 50),
    ("closed later", 'id,title\na,"Canvas\n' + "".join(f"i{n},It {n}\n" for n in range(20)) + 'b,end"\nc,x\n', 22),
    ("closed by a quoted row", 'id,title\na,"Canvas\nb,x\nc,"y, z"\nd,e\n', 3),
    ("one row, wide", 'id,title,brand\na,"Canvas,x\nb,end",y\n', 1),
    ("two rows, wide", 'id,title,brand\na,"Canvas,x\nb,c,d\ne,end",y\nf,g,h\n', 3),
    ("at the end", 'id,title\na,b\nc,"d', 1),
]


@pytest.mark.parametrize(("name", "text", "kept"), STRAY, ids=[name for name, *_ in STRAY])
def test_a_stray_quote_costs_its_own_row_only(tmp_path: Path, name: str, text: str, kept: int) -> None:
    rows = list(read_rows(write(tmp_path / "m.csv", text.encode()), required=("id",)))
    good = [row for _, row in rows if isinstance(row, dict)]
    bad = [(number, str(row)) for number, row in rows if isinstance(row, RowError)]
    assert len(good) == kept and bad and "line" in bad[0][1]
    assert [number for number, _ in rows] == list(range(1, len(rows) + 1))


def test_texts_of_many_lines_are_one_field(tmp_path: Path) -> None:
    text = "".join(f"First, second and third.\n<li>{n}</li>\n\n" for n in range(300))
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["id", "title", "body"], ["a", "A", text], ["b", 'B 5" pipe', "x"]])
    rows = [row for _, row in read_rows(write(tmp_path / "m.csv", buffer.getvalue().encode()), required=("id",))]
    assert [row["body"] for row in rows] == [text, "x"]  # type: ignore[index]


def test_nameless_columns_of_a_spreadsheet_are_no_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", b"id,category,,\n0,a,,\n1,b\n2,c,,,,\n3,d,x,\n")
    rows = list(read_rows(path))
    assert [row for _, row in rows[:3]] == [{"id": str(n), "category": c} for n, c in enumerate("abc")]
    assert isinstance(rows[3][1], RowError)
    (middle,) = read_rows(write(tmp_path / "n.csv", b"id,,title\na,,b\n"))
    assert middle == (1, {"id": "a", "title": "b"})


def test_packed_tables_and_tables_in_parts(tmp_path: Path) -> None:
    lines = b'{"id": "a"}\n{"id": "b"}\n'
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "m.csv.gz").write_bytes(gzip.compress(b"id\na\nb\n"))
    for name in ("m.jsonl.gz", "m.csv.gz"):
        assert list(read_rows(tmp_path / name)) == [(1, {"id": "a"}), (2, {"id": "b"})]
    whole = gzip.compress(b"".join(b'{"id": "%d"}\n' % n for n in range(5_000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bent.csv.gz").write_bytes(b"no gzip at all")
    *good, last = [row for _, row in read_rows(tmp_path / "cut.jsonl.gz")]
    assert good and all(isinstance(row, dict) for row in good) and "damaged" in str(last)
    assert "damaged" in str([row for _, row in read_rows(tmp_path / "bent.csv.gz")][-1])
    for folder, suffix in (("p", ".parquet"), ("j", ".jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "_SUCCESS").touch()
        for part in range(3):
            path = tmp_path / folder / f"part-{part:05d}{suffix}"
            ids = [f"{part}{n}" for n in range(2)]
            if suffix == ".parquet":
                pq.write_table(pa.table({"id": ids}), path)
            else:
                path.write_text("".join(json.dumps({"id": i}) + "\n" for i in ids))
        assert [(n, row["id"]) for n, row in read_rows(tmp_path / folder)] == [  # type: ignore[index]
            (1, "00"), (2, "01"), (3, "10"), (4, "11"), (5, "20"), (6, "21"),
        ]  # fmt: skip


def test_cells_that_python_cannot_hold_are_errors_where_they_are_used(tmp_path: Path) -> None:
    late = pa.array([0, 10**15], pa.timestamp("s"))  # the year 31 690 720
    pq.write_table(pa.table({"id": ["a", "b"], "seen": late, "title": late}), tmp_path / "m.parquet")
    rows = [row for _, row in read_rows(tmp_path / "m.parquet")]
    assert parse_item(rows[0])[0].title == "1970-01-01"  # type: ignore[arg-type]
    with pytest.raises(RowError, match=r"title is a timestamp"):
        parse_item(rows[1])  # type: ignore[arg-type]
    assert parse_item({k: v for k, v in rows[1].items() if k != "title"})  # type: ignore[union-attr]


def test_narrow_floats_keep_their_own_digits(tmp_path: Path) -> None:
    f4 = pa.float32()
    columns = {
        "id": pa.array(["a"]),
        "price": pa.array([0.1], f4),
        "attributes": pa.array([{"w": 0.1}], pa.struct([("w", f4)])),
        "attributes.l": pa.array([[0.1, 0.2]], pa.list_(f4)),
        "attributes.m": pa.array([0.1], pa.float64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    ((_, row),) = read_rows(tmp_path / "m.parquet")
    item, _ = parse_item(row)  # type: ignore[arg-type]
    assert item.price == 0.1 and item.attributes == {"w": "0.1", "l": "0.1, 0.2", "m": "0.1"}


def test_a_pipe_for_a_table_does_not_hang(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        os.mkfifo(tmp_path / f"m{suffix}")
        with pytest.raises(CatalogError, match="not a regular file"):
            list(read_rows(tmp_path / f"m{suffix}"))


def test_headers_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="none of the columns"):
        list(read_rows(write(tmp_path / "a.csv", b"x,y\n1,2\n"), required=("id", "file_name")))
    with pytest.raises(CatalogError, match="twice"):
        list(read_rows(write(tmp_path / "b.csv", b"id,id\n1,2\n"), required=("id",)))
    assert list(read_rows(write(tmp_path / "c.csv", b""), required=("id",))) == []


def test_parquet_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array(["a", "b"]),
            "price": pa.array([1.5, float("nan")]),
            "attributes": pa.array([{"k": "v"}, None], pa.struct([("k", pa.string())])),
            "more": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    rows = list(read_rows(tmp_path / "m.parquet"))
    assert rows == [
        (1, {"id": "a", "price": 1.5, "attributes": {"k": "v"}, "more": [("k", "v")]}),
        (2, {"id": "b", "price": None, "attributes": None, "more": None}),
    ]


def test_unreadable_files_are_catalogue_errors(tmp_path: Path) -> None:
    for name in ("m.parquet", "m.txt"):
        with pytest.raises(CatalogError):
            list(read_rows(write(tmp_path / name, b"PAR1 nonsense")))
    with pytest.raises(CatalogError, match="cannot be read"):
        list(read_rows(tmp_path / "absent.jsonl"))


SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(
    st.binary(max_size=400)
    | st.lists(st.sampled_from([b'{"id":', b'"a"}', b"\n", b"\r", b'"', b",", b"id", b"\x00"])).map(b"".join)
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_any_bytes_give_rows_or_typed_errors(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = write(tmp_path / f"fuzz{suffix}", data)
    try:
        rows = list(read_rows(path))
    except CatalogError:
        return
    numbers = [n for n, _ in rows]
    assert numbers == sorted(set(numbers))
    assert all(isinstance(value, (dict, RowError)) for _, value in rows)


# A text with a comma and several lines may look like rows within stray quotes; see the tests of those.
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")).filter(
    lambda text: "," not in text or not set(text) & set("\r\n")
)


@SLOW
@given(st.lists(st.lists(CELL, min_size=2, max_size=2)))
def test_csv_written_by_the_csv_module_reads_back(tmp_path: Path, table: list[list[str]]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["id", "title"])
    writer.writerows(table)
    path = write(tmp_path / "m.csv", buffer.getvalue().encode())
    values = [list(row.values()) for _, row in read_rows(path) if not isinstance(row, RowError)]
    assert values == [[cell or None for cell in row] for row in table]
