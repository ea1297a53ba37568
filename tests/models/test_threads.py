"""One model, one process, several threads: each caller gets what it would get alone, and finds its own state again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn

from tgq_fast.data.catalog import Catalog
from tgq_fast.defaults import Shared, own_randomness, single_precision
from tgq_fast.models import TGQFormerModel
from tgq_fast.models.inference import evaluating, in_run, packed_weights, running


@pytest.fixture
def model(vit: Any, llama: Any) -> TGQFormerModel:
    torch.manual_seed(0)
    return TGQFormerModel.from_config_with_towers(tiny.tiny_config(vit, llama, guide=True))


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that begin together in threads of their own."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(run, call) for call in calls]]


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_threads_encode_with_one_model(
    model: TGQFormerModel, catalog: Catalog, often: None, default: torch.dtype
) -> None:
    few, many = catalog.items[:3], [*catalog.items] * (70 // len(catalog) + 1)
    expected = [model.encode(items, root=catalog.root) for items in (few, many)]
    model.train()
    model.connector.eval()
    modes = [module.training for module in model.modules()]
    torch.set_default_dtype(default)
    try:
        found = at_once(*(lambda items=items: model.encode(items, root=catalog.root) for items in (few, many) * 3))
        after = torch.get_default_dtype()
    finally:
        torch.set_default_dtype(torch.float32)
    assert after == default
    assert [module.training for module in model.modules()] == modes
    assert [torch.equal(one, expected[n % 2]) for n, one in enumerate(found)] == [True] * 6


def test_a_run_of_another_thread_is_not_this_threads() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with packed_weights(layer):
            assert in_run(layer)
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(30)
    assert not in_run(layer) and running(layer) is layer
    with packed_weights(layer) as twin:
        leave.set()
        thread.join()
        assert running(layer) is twin  # though who opened it has left
    assert not in_run(layer)


def test_what_is_shared_is_made_once_and_undone_by_the_last() -> None:
    made: list[str] = []

    @contextmanager
    def change(key: str) -> Iterator[str]:
        made.append(f"+{key}")
        yield key
        made.append(f"-{key}")

    shared: Shared[str, str] = Shared(change)
    with shared("a"):
        with shared("a"), shared("b"):
            pass
        assert made == ["+a", "+b", "-b"]
    assert made == ["+a", "+b", "-b", "-a"]
    with pytest.raises(ZeroDivisionError), shared("a"):
        raise ZeroDivisionError
    assert made[-1] == "-a"


def test_the_last_thread_gives_the_modes_and_the_dtype_back() -> None:
    module = nn.Dropout()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with evaluating(module), single_precision():
            inside.set()
            leave.wait(30)

    torch.set_default_dtype(torch.float64)
    try:
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(30)
        with evaluating(module), single_precision():
            assert not module.training
        assert not module.training and torch.get_default_dtype() == torch.float32  # the other one relies on it still
        leave.set()
        thread.join()
        assert module.training and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_of_the_caller_go_on() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw(), draw()
    seed()
    first = draw()
    with pytest.raises(ZeroDivisionError), own_randomness():
        seed()
        draw()
        raise ZeroDivisionError
    assert (first, draw()) == expected
