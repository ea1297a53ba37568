"""Shared fixtures: no network, fixed seeds, optional real data."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

# Kernels run in Triton's interpreter where there is no GPU; it must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent / "models"))  # tiny_models serves the tests of the command line too


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real catalogues, named by TGQ_SHARED_DATA or found beside the checkout; skips without it."""
    folder = Path(os.environ.get("TGQ_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "fashion" / "metadata.jsonl").exists():
        pytest.skip(f"no real catalogues at {folder}")
    return folder
