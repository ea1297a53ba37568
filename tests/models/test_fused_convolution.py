"""Convolutions with what follows them, and parts of a batch side by side: values, bits, errors, copies, threads."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import conv2d, hardtanh, pad
from torch.utils.flop_counter import FlopCounterMode

from tgq_fast.models.fused_convolution import FusedConvolution
from tgq_fast.models.side_by_side import side_by_side


def fused(around: tuple[int, int, int, int], *, groups: int = 1, stride: int = 1, kernel: int = 3, relu6: bool = True):
    torch.manual_seed(kernel)
    plain = nn.Conv2d(8, 16, kernel, stride=stride, groups=groups)
    return FusedConvolution(plain, around, relu6=relu6)


def exact(layer: FusedConvolution, x: Tensor) -> Tensor:
    assert layer.bias is not None
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    out = conv2d(pad(x.double(), layer.around), weight, bias, layer.stride, 0, layer.dilation, layer.groups)
    return hardtanh(out, 0.0, 6.0) if layer.relu6 else out


@pytest.mark.parametrize(
    ("around", "more"),
    [
        ((0, 0, 0, 0), {"kernel": 1}),
        ((0, 0, 0, 0), {"kernel": 1, "relu6": False}),
        ((1, 1, 1, 1), {"groups": 8}),
        ((0, 1, 0, 1), {"stride": 2}),
        ((0, 1, 0, 1), {"stride": 2, "groups": 8}),
        ((1, 2, 1, 2), {"stride": 2, "groups": 8, "kernel": 5}),
        ((0, 1, 1, 2), {"stride": 2, "kernel": 4, "relu6": False}),
    ],
)
@pytest.mark.parametrize("shape", [(1, 8, 12, 12), (3, 8, 9, 14)])
def test_both_ways_give_the_exact_values(around, more, shape) -> None:
    layer, x = fused(around, **more), 4 * torch.randn(shape).contiguous(memory_format=torch.channels_last)
    expected = exact(layer, x)
    with torch.no_grad():
        assert layer._runs_fused(x) == torch.backends.mkldnn.is_available()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            layer(x[:1]).double(), expected[:1], rtol=1e-5, atol=1e-5
        )  # packed for another shape
    assert not layer._runs_fused(x)  # autograd
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert layer(x).requires_grad


def test_padding_that_the_library_cannot_take_is_refused() -> None:
    for around in ((0, 2, 0, 2), (1, 0, 1, 0), (0, 1, 0, 0)):
        with pytest.raises(ValueError, match="or one more"):
            fused(around)


def test_packed_weights_follow_a_cast_a_load_and_a_copy() -> None:
    layer, x = fused((0, 1, 0, 1), stride=2), torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        before = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert "_packed" not in vars(twin) and torch.equal(twin(x), before)
        other = fused((0, 1, 0, 1), stride=2)
        nn.init.ones_(other.weight)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)
        layer.double()
        torch.testing.assert_close(layer(x.double()), exact(layer, x), rtol=1e-12, atol=1e-12)


def test_side_by_side_keeps_the_order_and_the_callers_state() -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)

            def part(number: int) -> tuple[int, int, bool, str]:
                tensor = torch.ones(1, requires_grad=True) * number
                return number, torch.get_num_threads(), tensor.requires_grad, threading.current_thread().name

            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = side_by_side(part, range(17))
                assert torch.is_autocast_enabled("cpu")
            assert [number for number, *_ in made] == list(range(17))
            assert {own for _, own, _, _ in made} == {1}
            assert not any(recorded for _, _, recorded, _ in made)
            assert len({name for *_, name in made}) <= count
            assert torch.get_num_threads() == count and torch.is_grad_enabled()
            seen: list[int] = []
            later = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert seen == [count]  # what a thread begins with that starts afterwards
        with torch.inference_mode():
            assert side_by_side(lambda part: torch.ones(2).is_inference(), [0, 1]) == [True, True]
    finally:
        torch.set_num_threads(threads)


def test_side_by_side_raises_what_a_part_raised_and_goes_on_afterwards() -> None:
    def part(number: int) -> int:
        if number % 5 == 3:
            raise ValueError(f"part {number}")
        return number

    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with pytest.raises(ValueError, match="part 3"):
                side_by_side(part, range(10))
            assert side_by_side(part, [0, 1, 2]) == [0, 1, 2]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_side_by_side_in_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        side_by_side(abs, [1, -2])
        child = os.fork()
        if child == 0:
            os._exit(0 if side_by_side(abs, [1, -2, -3]) == [1, 2, 3] else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


class Parted(nn.Module):
    """What a tower does with a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = fused((0, 1, 0, 1), stride=2)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(side_by_side(self.layer, x.split(2)))


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_what_looks_on_at_the_callers_thread_sees_every_part() -> None:
    """A trace that misses what other threads do holds the example's values as constants."""
    model, example, other = Parted().eval(), torch.randn(6, 8, 12, 12), torch.randn(6, 8, 12, 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = model(other)
        traces = {
            "jit": lambda: torch.jit.trace(model, (example,), check_trace=False),
            "fx": lambda: make_fx(model)(example),
            "export": lambda: torch.export.export(model, (example,)).module(),
            "strict export": lambda: torch.export.export(model, (example,), strict=True).module(),
            "compile": lambda: torch.compile(model, backend="eager", fullgraph=True),
        }
        for name, trace in traces.items():
            torch.testing.assert_close(trace()(other), expected, rtol=1e-5, atol=1e-5, msg=name)
        with FlopCounterMode(display=False) as flops:
            model(other)
        assert flops.get_total_flops() == 2 * expected.numel() * model.layer.weight[0].numel()
    finally:
        torch.set_num_threads(threads)


AFTER_THE_END = """
import threading, time, torch
from tgq_fast.models.side_by_side import side_by_side
torch.set_num_threads(2)
side_by_side(abs, [1, -2, -3])
def work():
    threading.main_thread().join()
    time.sleep(0.2)
    print(side_by_side(abs, [1, -2, -3]))
    torch.set_num_threads(3)
    print(side_by_side(abs, [1, -2, -3]))
threading.Thread(target=work).start()
"""

NO_THREAD_MORE = """
import threading, torch
from tgq_fast.models.side_by_side import side_by_side
torch.set_num_threads(2)
start, asked = threading.Thread.start, []
def few(thread):
    if thread.name.startswith("tgq-part"):
        asked.append(thread)
        if len(asked) == 2:
            raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = few
for _ in range(2):
    print(side_by_side(abs, [1, -2, -3]))
assert len(asked) == 4
"""


@pytest.mark.parametrize("script", [AFTER_THE_END, NO_THREAD_MORE])
def test_side_by_side_where_no_thread_takes_work_goes_on_in_turn_and_the_process_ends(script: str) -> None:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[1, 2, 3]\n" * 2, "")
