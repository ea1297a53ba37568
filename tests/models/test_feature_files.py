"""Arrays in chunks on disk: resumed, repaired, read by others meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from hostile_places import read_only

from tgq_fast.errors import StorageError
from tgq_fast.models.feature_files import ChunkedArray

ROWS, CHUNK = 11, 3


def arrays(folder: Path) -> dict[str, bytes]:
    """The arrays of a complete cache by name, whatever build wrote them."""
    return {p.name.split(".")[0]: p.read_bytes() for p in sorted(folder.glob("*.bin"))}


def new_array(folder: Path, **facts: str) -> ChunkedArray:
    return ChunkedArray(
        folder, {"x": ("<f4", [2]), "n": ("<i4", [])}, rows=ROWS, chunk=CHUNK, ragged={"r": ("<i2", [])}, facts=facts
    )


def values(number: int) -> dict[str, np.ndarray]:
    size = min(CHUNK, ROWS - CHUNK * number)
    x = np.arange(2 * size, dtype=np.float32).reshape(size, 2) + 100 * number
    return {"x": x, "n": np.full(size, number), "r": np.arange(number)}


def fill(array: ChunkedArray, stop: int | None = None) -> list[int]:
    done = []
    with array.building() as todo:
        for number in todo:
            if number == stop:
                raise KeyboardInterrupt
            array.append(values(number), [[number, "note"]])
            done.append(number)
    return done


def test_chunked_array_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    fill(new_array(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        fill(new_array(tmp_path / "broken"), stop=2)
    # What a kill can leave: data beyond the journal and a torn journal line.
    with (tmp_path / "broken" / "x.0.bin").open("ab") as handle:
        handle.write(b"torn")
    with (tmp_path / "broken" / "journal.jsonl").open("ab") as handle:
        handle.write(b'{"bytes": {"x"')
    array = new_array(tmp_path / "broken")
    assert fill(array) == [2, 3]
    assert tiny.content(tmp_path / "whole") == tiny.content(tmp_path / "broken")
    assert array["x"].shape == (ROWS, 2) and array["r"].shape == (0 + 1 + 2 + 3,)
    assert np.array_equal(array["x"], np.concatenate([values(i)["x"] for i in range(4)]))
    assert array.notes == [[i, "note"] for i in range(4)]


@pytest.mark.parametrize("file", ["x.0.bin", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_damaged_chunks_are_made_again(tmp_path: Path, file: str, harm: str) -> None:
    fill(new_array(tmp_path))
    good = arrays(tmp_path)
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    again = fill(new_array(tmp_path))
    assert again == ([1] if (file, harm) == ("x.0.bin", "flip") else again) and again  # no more than what is damaged
    assert arrays(tmp_path) == good
    assert fill(new_array(tmp_path)) == []
    assert sorted(p.name.split(".")[0] for p in tmp_path.glob("*.bin")) == ["n", "r", "x"]  # nothing old is left


def test_a_cache_of_the_first_version_is_read(tmp_path: Path) -> None:
    array = new_array(tmp_path)
    fill(array)
    body = json.loads((tmp_path / "manifest.json").read_text())
    chunks = [{name: chunk[name] for name in ("bytes", "sha256", "notes")} for chunk in body["chunks"]]
    chunks[0]["notes"] = chunks[1]["notes"] = chunks[3]["notes"] = []
    (tmp_path / "manifest.json").write_text(json.dumps({"facts": body["facts"], "chunks": chunks}))
    for name in ("x", "n", "r"):
        (tmp_path / f"{name}.0.bin").rename(tmp_path / f"{name}.bin")
    again = new_array(tmp_path)
    assert fill(again) == [2]  # that version kept a moment's verdict too: what has notes is made again
    assert np.array_equal(again["x"], array["x"])


def test_a_repair_leaves_the_files_that_others_have_mapped(tmp_path: Path) -> None:
    """In a process of its own: a mapped file that is cut ends the reader with SIGBUS."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import numpy as np
from tgq_fast.models.feature_files import ChunkedArray
def array():
    return ChunkedArray(Path({str(tmp_path / "a")!r}), {{"x": ("<f4", [1024])}}, rows=8, chunk=2, facts={{}})
def fill(made):
    with made.building() as todo:
        for number in todo:
            yield number
            made.append({{"x": np.full((2, 1024), number)}}, [])
list(fill(array()))
reader = array()
list(fill(reader))
file = next(Path({str(tmp_path / "a")!r}).glob("x*.bin"))
with file.open("r+b") as handle:
    handle.write(b"damaged")
for number in fill(array()):
    assert reader["x"][-1, -1] == 3, "cut while it is mapped"
assert reader["x"][-1, -1] == 3
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_complete_cache_on_a_read_only_disk_is_used(tmp_path: Path) -> None:
    fill(new_array(tmp_path / "whole"))
    with read_only():
        array = new_array(tmp_path / "whole")
        assert fill(array) == [] and len(array["x"]) == ROWS
        with pytest.raises(StorageError, match="Read-only"):
            fill(new_array(tmp_path / "absent"))


def test_other_facts_do_not_reuse_a_folder(tmp_path: Path) -> None:
    fill(new_array(tmp_path, tower="a"))
    assert fill(new_array(tmp_path, tower="a")) == []
    assert len(fill(new_array(tmp_path, tower="b"))) == 4


def test_array_without_rows(tmp_path: Path) -> None:
    array = ChunkedArray(tmp_path, {"x": ("<f4", [2])}, rows=0, chunk=4, facts={})
    with array.building() as todo:
        assert list(todo) == []
    assert array["x"].shape == (0, 2)
