"""Streaming readers of the three table formats."""

from __future__ import annotations

import csv
import io
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tgq_fast.data.items import RowError
from tgq_fast.data.rows import read_rows
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


@SLOW
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), min_size=2, max_size=2)
    )
)
def test_csv_written_by_the_csv_module_reads_back(tmp_path: Path, table: list[list[str]]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["id", "title"])
    writer.writerows(table)
    path = write(tmp_path / "m.csv", buffer.getvalue().encode())
    values = [list(row.values()) for _, row in read_rows(path) if not isinstance(row, RowError)]
    assert values == [[cell or None for cell in row] for row in table]
