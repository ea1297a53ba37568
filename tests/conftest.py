"""Shared fixtures: no network, fixed seeds, optional real data."""

from __future__ import annotations

import os
import shutil
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest
import torch

# Kernels run in Triton's interpreter where there is no GPU; it must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tiny_models and planting serve many tests.
sys.path[:0] = [str(Path(__file__).parent / "models"), str(Path(__file__).parent)]


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


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A headless Chromium that keeps its console and network logs; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "no-sandbox", "no-first-run", "window-size=1200,900"]
    flags += [f"disable-{name}" for name in ("gpu", "quic", "background-networking", "component-update", "sync")]
    for flag in (*flags, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(service=Service(driver), options=options)
    yield browser
    browser.quit()
