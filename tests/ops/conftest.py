"""Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before Triton loads."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU these tests are the kernels' GPU tests, so that `-m gpu` runs them."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.gpu)
