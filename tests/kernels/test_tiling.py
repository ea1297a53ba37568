"""Tile tables: which row is picked, tables of one's own, and tuning with a clock of one's own."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernel tests need triton")

from tgq_fast.errors import BackendError
from tgq_fast.kernels import tiling, tune


def test_rows_are_shape_classes() -> None:
    picked = {n: tiling.pick("absorbed_forward", ("sm_90",), 16, keys=n, rows=192) for n in (1, 64, 65, 197, 256, 257)}
    assert picked[1] == picked[64] != picked[65]
    assert picked[197] == picked[256] != picked[257]
    assert all(not key.startswith("max_") for row in picked.values() for key in row)


def test_longer_than_every_class_takes_the_last_row() -> None:
    last = tiling.pick("absorbed_forward", ("sm_90",), 16, keys=10**6, rows=192)
    assert last == tiling.pick("absorbed_forward", ("sm_90",), 16, keys=2048, rows=192)


def test_unknown_architectures_take_the_nearest_below() -> None:
    assert tiling._nearest("sm_86") == tiling._nearest("sm_80") == "sm_80"
    assert tiling._nearest("sm_120") == "sm_100"
    wanted = tiling.pick("stream_forward", ("sm_80",), 16, rows=64, keys=80, head=64)
    assert tiling.pick("stream_forward", ("NVIDIA_A10", "sm_86"), 16, rows=64, keys=80, head=64) == wanted


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_shipped_tables_are_not_called_measured(name: str) -> None:
    data = json.loads((tiling.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert data["measured"] is False and data["gpu"] == name
    assert set(data["kernels"]) == set(tiling.table("interpreter")["kernels"])


def test_tuning_keeps_the_fastest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def launch() -> dict:
        return tiling.pick("modulation_forward", ("interpreter",), 32, rank=8)

    def clock(run) -> float:  # type: ignore[no-untyped-def]
        row = run()
        seen.append(row)
        if row["num_warps"] == 4:
            raise RuntimeError("out of resource")
        return 1.0 if row["num_stages"] == 3 and row["ITEMS"] == 8 else 2.0

    work = iter([("modulation_forward", {"max_rank": 64}, launch)])
    path = tune.tune(tmp_path, dtype=torch.float32, device="cpu", time=clock, work=work)
    assert len(seen) > 10
    [row] = json.loads(path.read_text())["kernels"]["modulation_forward"]["32"]
    assert (row["num_stages"], row["ITEMS"], row["max_rank"]) == (3, 8, 64)

    monkeypatch.setenv("TGQ_TILES", str(tmp_path))
    tiling.table.cache_clear()
    try:
        assert tiling.pick("modulation_forward", ("interpreter",), 32, rank=8)["num_stages"] == 3
    finally:
        monkeypatch.delenv("TGQ_TILES")
        tiling.table.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="CUDA"):
        tune.tune(tmp_path)
