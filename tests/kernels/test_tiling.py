"""Tile tables: which row is picked, tables of one's own, and tuning with a clock of one's own."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernel tests need triton")

from tgq_fast.errors import ArgumentError, BackendError
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


def picked_row() -> dict:
    return tiling.pick("modulation_forward", ("interpreter",), 32, rank=8)


def test_tuning_keeps_the_fastest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def clock(launch, graph: bool) -> float:  # type: ignore[no-untyped-def]
        launch()
        row = seen[-1]
        if row["num_warps"] == 4:
            raise RuntimeError("out of resource")
        return 1.0 if row["num_stages"] == 3 and row["ITEMS"] == 8 else 2.0

    work = [("modulation_forward", {"rank": 64}, lambda: seen.append(picked_row()))]
    tuning = tune.Tuning(tmp_path, dtype=torch.float32, device="cpu", clock=clock)
    tuning.tiles(iter(work))
    assert len(seen) > 10
    [row] = json.loads(tuning.path.read_text())["kernels"]["modulation_forward"]["32"]
    assert (row["num_stages"], row["ITEMS"]) == (3, 8)

    monkeypatch.setenv("TGQ_TILES", str(tmp_path))
    tiling.table.cache_clear()
    try:
        assert picked_row()["num_stages"] == 3
    finally:
        monkeypatch.delenv("TGQ_TILES")
        tiling.table.cache_clear()


def test_tuning_replaces_one_row_of_a_complete_table_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "gpu_names", lambda index: ("A_GPU", "sm_90"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kernel, sizes in (
        ("absorbed_forward", {"keys": 256, "rows": 192}),
        ("stream_forward", {"rows": 16, "head": 64}),
    ):
        tuning = tune.Tuning(tmp_path, clock=lambda launch, graph: launch() or 1.0)
        tuning.tiles(iter([(kernel, sizes, lambda: None)]))
    data = json.loads((tmp_path / "A_GPU.json").read_text())
    assert list(data["timed"]) == ["absorbed_forward 16 max_keys=256", "stream_forward 16 max_rows=16 max_head=64"]
    shipped = tiling.table("sm_90")["kernels"]["absorbed_forward"]["16"]
    assert data["kernels"]["absorbed_forward"]["16"] == shipped  # all took equally long: the shipped row stays


def test_tuning_stops_in_time_and_tunes_what_it_is_asked(tmp_path: Path) -> None:
    clock = {"clock": lambda launch, graph: 1.0, "device": "cpu", "dtype": torch.float32}
    work = [(kernel, {"keys": 8, "rows": 8}, lambda: None) for kernel in ("stream_forward", "absorbed_forward")]
    late = tune.Tuning(tmp_path, budget_s=0, **clock)
    late.tiles(iter(work))
    assert not late.path.exists()
    some = tune.Tuning(tmp_path, only="absorbed*", **clock)
    some.tiles(iter(work))
    assert list(some.table["kernels"]) == ["absorbed_forward"]


def test_a_foreign_table_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "interpreter.json").write_text("not a table")
    with pytest.raises(ArgumentError, match=r"interpreter\.json"):
        tune.Tuning(tmp_path, device="cpu")


def test_limits_are_tuned_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgq_fast.ops import cross_attention_triton, tuning

    cpu, called = torch.device("cpu"), []
    monkeypatch.setattr(
        tuning, "_attend", lambda *_: lambda fused: called.append((fused, cross_attention_triton.chunk_bytes(cpu)))
    )

    def clock(launch, graph: bool, fused_ms: float) -> float:  # type: ignore[no-untyped-def]
        launch()
        fused, size = called[-1]
        return fused_ms if fused else 1.0 + (size != (16 if graph else 64) * 2**20)

    corrections = []
    for fused_ms in (3.0, 6.0):
        options = {"only": "limits", "device": "cpu", "dtype": torch.float32}
        found = tuning.tune(tmp_path, **options, clock=partial(clock, fused_ms=fused_ms))
        limits = json.loads(found["table"].read_text())["limits"]
        assert (limits["chunk_bytes"], limits["graph_chunk_bytes"]) == (64 * 2**20, 16 * 2**20)
        corrections.append(limits["fused_correction"])
    assert corrections[1] == pytest.approx(2 * corrections[0])
    monkeypatch.setenv("TGQ_TILES", str(tmp_path))
    tiling.table.cache_clear()
    try:
        assert cross_attention_triton.chunk_bytes(cpu) == 64 * 2**20
        assert tiling.limit("fused_correction", cpu) == corrections[1]
    finally:
        monkeypatch.delenv("TGQ_TILES")
        tiling.table.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no CUDA device"):
        tune.Tuning(tmp_path)


@pytest.mark.parametrize(("switch", "on", "off"), [("allow_tf32", True, False), ("fp32_precision", "tf32", "ieee")])
def test_either_switch_of_pytorch_allows_tf32(switch: str, on: object, off: object) -> None:
    single, half = torch.zeros(1), torch.zeros(1).half()
    try:
        setattr(torch.backends.cuda.matmul, switch, on)
        assert (tiling.precision(single), tiling.precision(half)) == ("tf32", "ieee")
    finally:
        setattr(torch.backends.cuda.matmul, switch, off)
    assert tiling.precision(single) == "ieee"
