"""Backend choice: argument, context, environment, explanation, refusal."""

import logging
import subprocess
import sys

import pytest
import torch

from tgq_fast import ops
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.ops import dispatch
from tgq_fast.ops.cross_attention_cost import form_cost


def qkv(dtype: torch.dtype = torch.float64, head: int = 8) -> list[torch.Tensor]:
    return [torch.randn(1, 6, 2, head, dtype=dtype) for _ in range(3)]


def cross_arguments(queries: int = 4, length: int = 9) -> tuple:
    weights = [torch.randn(16, n) for n in (16, 12, 12)]
    a, x = torch.randn(2, queries, 16), torch.randn(2, length, 12)
    return a, a[:, :0], x, weights[0], None, weights[1], None, weights[2], None


def test_forced_backend_lists_every_reason() -> None:
    with pytest.raises(BackendError) as caught:
        ops.stream_self_attention(*qkv(head=300), (2, 2, 2), backend="triton")
    reasons = " ".join(caught.value.reasons["triton"])
    assert "float64" in reasons and "300" in reasons
    options = {"num_heads": 2, "key_mask": torch.ones(2, 9, dtype=torch.bool), "form": "absorbed"}
    with pytest.raises(BackendError) as caught:
        options |= {"guide": torch.zeros(2, 9), "guide_scale": torch.zeros(4, 2)}
        ops.hybrid_cross_attention(*cross_arguments(), **options, return_stats=True, backend="flash_attn")
    reasons = " ".join(caught.value.reasons["flash_attn"])
    for word in ("CUDA", "absorbed", "mask", "guide", "statistics", "float32"):
        assert word in reasons
    with pytest.raises(BackendError, match="no such backend"):
        ops.info_nce(torch.randn(3, 4), torch.tensor([1, 2, 0]), torch.tensor(1.0), backend="flash_attn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(BackendError, match="bfloat16"):
        ops.stream_self_attention(*qkv(torch.bfloat16), (2, 2, 2), backend="triton")


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TGQ_BACKEND", raising=False)
    assert dispatch.requested_backend(None) == "auto"
    monkeypatch.setenv("TGQ_BACKEND", "triton")
    assert dispatch.requested_backend(None) == "triton"
    with ops.use_backend("auto"):
        assert dispatch.requested_backend(None) == "auto"
        with ops.use_backend("torch"):
            assert dispatch.requested_backend(None) == "torch"
            assert dispatch.requested_backend("triton") == "triton"
        assert dispatch.requested_backend(None) == "auto"
    monkeypatch.setenv("TGQ_BACKEND", "cuda9")
    with pytest.raises(ArgumentError, match="TGQ_BACKEND"):
        dispatch.requested_backend(None)
    with pytest.raises(ArgumentError), ops.use_backend("fast"):
        pass


def test_context_is_left_on_errors() -> None:
    with pytest.raises(RuntimeError), ops.use_backend("torch"):
        raise RuntimeError
    assert not dispatch._blocks


def test_blocks_of_several_threads_may_end_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TGQ_BACKEND", raising=False)
    first, second = ops.use_backend("torch"), ops.use_backend("triton")
    first.__enter__()
    second.__enter__()
    assert dispatch.requested_backend(None) == "triton"
    first.__exit__(None, None, None)
    assert dispatch.requested_backend(None) == "triton"
    second.__exit__(None, None, None)
    assert dispatch.requested_backend(None) == "auto"  # not "torch", which the second one found


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes the kernels on a GPU")
def test_auto_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv("TGQ_BACKEND", raising=False)
    with caplog.at_level(logging.INFO, "tgq_fast.ops"):
        for _ in range(3):
            ops.stream_self_attention(*qkv(torch.float32), (2, 2, 2))
    assert len(caplog.records) == 1 and "triton not used" in caplog.text


def test_explain() -> None:
    arguments = cross_arguments()
    decision = ops.explain(ops.hybrid_cross_attention, *arguments, num_heads=2, form="absorbed", backend="torch")
    assert (decision.backend, decision.form, decision.requested) == ("torch", "absorbed", "torch")
    assert "flash_attn" in str(decision)
    by_name = ops.explain("stream_self_attention", *qkv(), (2, 2, 2), backend="torch")
    assert by_name.op == "stream_self_attention" and by_name.form is None
    assert "cost model" in str(ops.explain(ops.hybrid_cross_attention, *arguments, num_heads=2))
    with pytest.raises(ArgumentError, match="stream_self_attention"):
        ops.explain("softmax")


def test_cost_model_orders_the_known_cases() -> None:
    paper = {"length": 197, "visual_width": 768, "width": 768, "num_heads": 12}
    siglip = {"length": 729, "visual_width": 1152, "width": 1152, "num_heads": 16}
    for device in ("cpu", "cuda"):
        assert form_cost(queries=16, device=device, **paper).best == "absorbed"
        assert form_cost(queries=64, device=device, **paper).best == "projected"
        assert form_cost(queries=16, device=device, **siglip).best == "absorbed"
    # Frozen weights: the projected backward needs no product over all visual tokens, which favours it.
    learned = form_cost(queries=16, grad_queries=True, grad_weights=True, **paper)
    frozen = form_cost(queries=16, grad_queries=True, **paper)
    assert frozen.absorbed / frozen.projected > learned.absorbed / learned.projected


def test_fusion_is_for_small_calls() -> None:
    from tgq_fast.kernels.cross_attention_fusion import fusion_cost, parts

    paper = {"queries": 16, "length": 197, "visual_width": 768, "num_heads": 12, "head": 64, "item_size": 2}
    siglip = {"queries": 16, "length": 729, "visual_width": 1152, "num_heads": 16, "head": 72, "item_size": 2}
    for shape, fused, separate in ((paper, 8, 16), (siglip, 2, 8)):
        assert fusion_cost(batch=fused, processors=132, **shape).fuse
        assert not fusion_cost(batch=separate, processors=132, **shape).fuse
    assert not fusion_cost(batch=1, processors=132, correction=5.0, **paper).fuse
    assert parts(12, 197, 132) == 4  # no part below 64 keys
    assert parts(96, 197, 132) == 1  # the heads alone fill the multiprocessors
    assert parts(10**4, 729, 132) == 3  # no part above 256 keys
    assert parts(1, 0, 132) == 1


def test_explain_says_whether_a_call_is_fused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from tgq_fast.ops import cross_attention

    monkeypatch.setattr(cross_attention, "triton_reasons", lambda *tensors, forced: [])
    monkeypatch.setattr(cross_attention, "multiprocessors", lambda device: (132, 1.0))

    def call(batch: int, **options) -> dispatch.Decision:  # type: ignore[no-untyped-def]
        d, dv = torch.empty(768, 768), torch.empty(768, 768)
        a, x = torch.empty(1, 16, 768).expand(batch, -1, -1), torch.empty(1, 197, 768).expand(batch, -1, -1)
        return ops.explain(
            "hybrid_cross_attention", a, a[:, :0], x, d, None, dv, None, dv, None, num_heads=12, **options
        )

    small, large = call(1), call(1024)
    assert (small.form, large.form) == ("fused", "absorbed")
    assert "us fused" in str(small) and "us fused" in str(large)
    assert call(1, form="absorbed").form == "absorbed" and call(1024, form="fused").form == "fused"


def test_fused_form_needs_its_kernel() -> None:
    with pytest.raises(BackendError, match="no fused form"):
        ops.hybrid_cross_attention(*cross_arguments(), num_heads=2, form="fused", backend="torch")
    with pytest.raises(BackendError, match=r"head.*no fused form"):
        weights = [torch.randn(600, n) for n in (600, 12, 12)]
        a, x = torch.randn(2, 4, 600), torch.randn(2, 9, 12)
        ops.hybrid_cross_attention(
            a, a[:, :0], x, weights[0], None, weights[1], None, weights[2], None, num_heads=2, form="fused"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"form": "fast"}, "form"),
        ({"form": "absorbed", "keys_values": (torch.zeros(2, 9, 16),) * 2}, "form"),
        ({"form": "fused", "keys_values": (torch.zeros(2, 9, 16),) * 2}, "form"),
        ({"guide": torch.zeros(2, 9)}, "guide_scale"),
        ({"guide_scale": torch.zeros(4, 2)}, "guide"),
        ({"guide": torch.zeros(2, 8), "guide_scale": torch.zeros(4, 2)}, "guide"),
        ({"guide": torch.zeros(2, 9, dtype=torch.bool), "guide_scale": torch.zeros(4, 2)}, "guide"),
        ({"guide": torch.zeros(2, 9), "guide_scale": torch.zeros(2, 4)}, "guide_scale"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.hybrid_cross_attention(*cross_arguments(), **{"num_heads": 2, **change})


def test_shapes_are_checked() -> None:
    a, e, x, *weights = cross_arguments()
    with pytest.raises(ArgumentError, match="batch"):
        ops.hybrid_cross_attention(a[:1], e, x, *weights, num_heads=2)
    with pytest.raises(ArgumentError, match="lengths"):
        ops.stream_self_attention(*qkv(), (2, 2, 3))
    with pytest.raises(ArgumentError, match="mixing"):
        ops.stream_self_attention(*qkv(), (2, 2, 2), mixing="half")
    with pytest.raises(ArgumentError, match="positives"):
        ops.info_nce(torch.randn(3, 4), torch.tensor([1]), torch.tensor(1.0))
    with pytest.raises(ArgumentError, match="groups"):
        ops.info_nce(torch.randn(3, 4), torch.tensor([1, 2, 0]), torch.tensor(1.0), groups=torch.tensor([1]))
    with pytest.raises(ArgumentError, match="anchored, exploratory"):
        ops.redundancy_loss(torch.randn(3, 4), torch.randn(3, 5))


def test_importing_ops_loads_no_kernels() -> None:
    code = "import sys, tgq_fast.ops; sys.exit(any(m.startswith('tgq_fast.kernels.') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
