"""What the CUDA search decides in Python, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tgq_fast.errors import ArgumentError
from tgq_fast.search import topk_cuda
from tgq_fast.search.topk_cuda import TUNING_VARIABLE, _dense, tuning_options


def test_tuning_comes_from_the_argument_and_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TUNING_VARIABLE, raising=False)
    assert tuning_options() == {}
    assert tuning_options({"engine": "skinny", "forced_threshold": -1}) == {"engine": 4, "forced_threshold": -1.0}
    monkeypatch.setenv(TUNING_VARIABLE, "hopper_tile=64x256, chunk_rows=65536")
    assert tuning_options() == {"hopper_tile": 2, "chunk_rows": 65536}
    assert tuning_options({"hopper_tile": "128x256"}) == {"hopper_tile": 3, "chunk_rows": 65536}


@pytest.mark.parametrize(
    "text", ["hopper_tile=63x63", "engine", "rows=1", "chunk_rows=many", "forced_threshold=low", "engine=3"]
)
def test_unknown_tuning_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TUNING_VARIABLE, text)
    with pytest.raises(ArgumentError, match="tuning") as caught:
        tuning_options()
    assert text.partition("=")[0] in str(caught.value)


def test_strided_results_keep_what_a_later_part_adds_to() -> None:
    dense, strided = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(3, 2).T
    assert _dense(dense, keep=False) is dense and _dense(dense, keep=True) is dense
    assert torch.equal(_dense(strided, keep=True), strided)
    for keep in (False, True):
        assert _dense(strided, keep).is_contiguous() and _dense(strided, keep).data_ptr() != strided.data_ptr()


def test_a_self_join_without_room_computes_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(size: int, **_: object) -> torch.Tensor:
        if size > room:
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(size, dtype=torch.uint8)

    def needed(*given: object) -> tuple[int, str, int]:
        return 0, "", 100 if given[-1].get("self_join") == 0 else 5000  # type: ignore[attr-defined]

    monkeypatch.setattr(topk_cuda.torch, "empty", empty)
    module, options = SimpleNamespace(cuda_workspace=needed), {"engine": 3}
    room = 6000
    assert len(topk_cuda._workspace(module, (), 0, options)) == 5000 and "self_join" not in options
    room = 1000
    assert len(topk_cuda._workspace(module, (), 0, options)) == 100 and options["self_join"] == 0
    room = 10
    with pytest.raises(torch.OutOfMemoryError):
        topk_cuda._workspace(module, (), 0, options)
