"""InfoNCE through its kernels and on torch against the reference, forward and gradients; what it holds in memory."""

import importlib

import pytest
import torch
from op_checks import DEVICE, DTYPES, check_info_nce

from tgq_fast import ops, reference

MODULE = importlib.import_module("tgq_fast.ops.info_nce")  # whose name in the package is the operator


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce(dtype: torch.dtype, backend: str) -> None:
    check_info_nce(dtype, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_info_nce_repeated_anchors_without_groups(backend: str) -> None:
    check_info_nce(torch.float32, items=19, width=16, rows=[3, 3, 0, 18, 7], groups=False, backend=backend)


@pytest.mark.parametrize("rows", [None, [3, 3, 0, 36, 7]])
def test_info_nce_chunks(rows: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 100)  # 37 items: two anchors per chunk
    check_info_nce(torch.float32, rows=rows, backend="torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_info_nce_of_unlike_negative_labels_and_an_anchor_that_is_its_own_positive(backend: str) -> None:
    e = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = torch.tensor([-1, -2, -1, 3, 3, -2])
    positives, scale = torch.tensor([0, 2, 5, 4, 3, 1]), torch.tensor(1.5)
    exact = reference.info_nce(e.double(), positives, scale.double(), groups=groups)
    found = ops.info_nce(
        e.to(DEVICE), positives.to(DEVICE), scale.to(DEVICE), groups=groups.to(DEVICE), backend=backend
    )
    torch.testing.assert_close(found.cpu(), exact.float())


def test_info_nce_holds_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 500)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    e, t, rows = torch.randn(128, 4), torch.tensor(0.5), torch.arange(128)
    fixed = rows ^ 1, t, rows // 2, rows
    with Watch():  # the implementations: a mode sees an operator of ours as one call
        loss, lse = MODULE.info_nce_forward._init_fn(e, *fixed, False)
        MODULE.info_nce_backward._init_fn(loss, e, *fixed, lse, False)
    assert 0 < largest <= 128 * 4
